"""Multiple-choice questions: which option does the model choose?

    cloze     score of an option = mean log-probability of its tokens after the question; the options are not shown
    letters   score of an option = log-probability of its letter, with or without a space before it, after the question
              with its options, in the chat template where there is one

The same batches are run with and without a guardrail, so that a question that does not trigger is scored on the very
same bits. Chance is 1 / number of options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import torch

from saeguard.calibration import Rate
from saeguard.corpus import read_rows
from saeguard.errors import CorpusError
from saeguard.evaluation.prefix import Read, common_prefix, read, read_endings, read_options
from saeguard.guardrail import Guardrail
from saeguard.online.verdicts import Verdict, Watch
from saeguard.windows import bos_ids, chat_ids, text_ids

Form = Literal["cloze", "letters"]
PROMPT = "Quiz\nQuestion: {question}\nAnswer:"
LETTER_PROMPT = "Answer this question with the letter of one option.\n\n{question}\n{options}"
LETTER_START = "Answer: ("
BATCH_QUESTIONS = 16
ORDERED_OPTIONS = 4


@dataclass(frozen=True)
class Question:
    """A question, its options and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answer:
    """What the model chose, whether that is right, whether the question triggered the guardrail, its verdict, and
    whether the question was refused. A refused question has no answer: none is right."""

    chosen: int
    right: bool
    triggered: bool
    verdict: Verdict | None = None
    refused: bool = False


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a `.jsonl[.gz]` file with `question`, `choices` and `answer` (index). Raises `CorpusError`."""
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"no such file: {path}")
    return [question_of(row, f"{path}, question {number}") for number, row in enumerate(read_rows(path), 1)]


def question_of(row: dict[str, Any], where: str) -> Question:
    """The question that a row holds. Raises `CorpusError`."""
    text, choices, answer = (row.get(name) for name in ("question", "choices", "answer"))
    good = isinstance(text, str) and isinstance(choices, list) and isinstance(answer, int)
    if not good or not all(isinstance(c, str) for c in choices):  # type: ignore[union-attr]
        raise CorpusError(f"{where}: expected a text `question`, a list of texts `choices`, and the index `answer`")
    if not 0 <= answer < len(choices):  # type: ignore[operator,arg-type]
        raise CorpusError.mismatch(
            f"{where}, index of the right answer", found=answer, expected=f"0 to {len(choices) - 1}",  # type: ignore[arg-type]
            fix="Answers count from 0.",
        )  # fmt: skip
    return Question(text, tuple(choices), answer)  # type: ignore[arg-type]


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    guardrail: Guardrail | None = None,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Answer every question in cloze form, in order, with the guardrail attached if there is one."""
    answers: dict[int, Answer] = {}
    with nullcontext() if guardrail is None else guardrail.attach(model, tokenizer) as guard:
        for some in question_batches(tokenizer, questions, "cloze"):
            batch = [questions[i] for i in some]
            answers |= zip(some, answer_batch(model, tokenizer, batch, guard, "cloze"), strict=True)
            advance(len(some))
    return [answers[i] for i in range(len(questions))]


def accuracy(answers: Iterable[Answer]) -> Rate:
    """Share of right answers."""
    right = [answer.right for answer in answers]
    return Rate(sum(right), len(right))


def trigger_rate(answers: Iterable[Answer]) -> Rate:
    """Share of questions that triggered."""
    triggered = [answer.triggered for answer in answers]
    return Rate(sum(triggered), len(triggered))


def question_batches(tokenizer: Any, questions: Sequence[Question], form: Form) -> Iterator[list[int]]:
    """Indices of questions of like length and equally many options, `BATCH_QUESTIONS` at a time."""

    def key(i: int) -> tuple[int, int]:
        return len(questions[i].choices), len(prompt_of(tokenizer, questions[i], form))

    keys = {i: key(i) for i in range(len(questions))}
    batch: list[int] = []
    for i in sorted(keys, key=keys.__getitem__):
        if batch and (len(batch) == BATCH_QUESTIONS or keys[i][0] != keys[batch[0]][0]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def prompt_of(tokenizer: Any, question: Question, form: Form) -> list[int]:
    """The ids of the prompt in one form."""
    if form == "cloze":
        return bos_ids(tokenizer) + text_ids(tokenizer, PROMPT.format(question=question.text))
    options = "\n".join(f"({letter}) {text}" for letter, text in zip(ascii_uppercase, question.choices, strict=False))
    text = LETTER_PROMPT.format(question=question.text, options=options)
    if tokenizer.chat_template is None:
        return bos_ids(tokenizer) + text_ids(tokenizer, f"{text}\n{LETTER_START}")
    return chat_ids(tokenizer, [{"role": "user", "content": text}]) + text_ids(tokenizer, LETTER_START)


def answer_batch(
    model: Any, tokenizer: Any, batch: Sequence[Question], guard: Watch | None, form: Form
) -> list[Answer]:
    """Answer questions that have equally many options, in one batch."""
    prompts = [prompt_of(tokenizer, question, form) for question in batch]
    if form == "letters":
        letters = _letter_ids(tokenizer, len(batch[0].choices))
        return [_by_letter(one, letters, q) for one, q in zip(read(model, prompts, guard), batch, strict=True)]
    return answer_prompts(model, tokenizer, prompts, batch, guard)


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    batch: Sequence[Question],
    guard: Watch | None,
    *,
    share: bool = False,
) -> list[Answer]:
    """In cloze form, questions with equally many options that are asked by the ids of any prompts.

    `share`: what the prompts have in common is read once (prefix.py).
    """
    options = [[text_ids(tokenizer, f" {choice}") for choice in question.choices] for question in batch]
    answers = []
    reads = read_options(model, prompts, options, guard, share=share)
    for one, its, question in zip(reads, options, batch, strict=True):
        scores = []
        for option, later in zip(its, one.later, strict=True):
            rest = later[torch.arange(len(option) - 1), torch.tensor(option[1:], dtype=torch.long)]
            scores.append(float((one.log_probabilities[option[0]] + rest.sum()) / len(option)))
        answers.append(_answer(scores, one, question))
    return answers


def right_in_all_orders(model: Any, tokenizer: Any, question: Question) -> bool:
    """Whether the unguarded model is right under all 24 orders of four options, by letter. Raises `CorpusError`.

    The orders share the question's cache; they are read only if the model is right in the order as given.
    """
    if len(question.choices) != ORDERED_OPTIONS:
        raise CorpusError.mismatch(
            f"options of {question.text!r}", found=len(question.choices), expected=ORDERED_OPTIONS,
            fix="The 24 orders are of four options: use --protocol plain.",
        )  # fmt: skip
    if not answer_batch(model, tokenizer, [question], None, "letters")[0].right:
        return False
    ordered = [
        Question(question.text, tuple(question.choices[i] for i in order), order.index(question.answer))
        for order in permutations(range(ORDERED_OPTIONS))
    ]
    prompts = [prompt_of(tokenizer, each, "letters") for each in ordered]
    shared = common_prefix(prompts)
    endings = [row[shared:] for row in prompts]
    letters = _letter_ids(tokenizer, ORDERED_OPTIONS)
    (reads,) = read_endings(model, [prompts[0][:shared]], [endings], None)
    return all(_by_letter(one, letters, each).right for one, each in zip(reads, ordered, strict=True))


def _by_letter(one: Read, letters: Sequence[list[int]], question: Question) -> Answer:
    scores = [float(one.log_probabilities[ids].max()) for ids in letters]
    return _answer(scores, one, question)


def _answer(scores: Sequence[float], one: Read, question: Question) -> Answer:
    chosen = max(range(len(scores)), key=scores.__getitem__)
    triggered = one.verdict is not None and one.verdict.triggered
    return Answer(chosen, chosen == question.answer and not one.refused, triggered, one.verdict, one.refused)


def _letter_ids(tokenizer: Any, count: int) -> list[list[int]]:
    """For each letter its one-token forms. Raises `CorpusError` where a letter has none."""
    if count > len(ascii_uppercase):
        raise CorpusError(f"a question has {count} options, more than there are letters: use the cloze form")
    found = []
    for letter in ascii_uppercase[:count]:
        forms = [text_ids(tokenizer, text) for text in (letter, f" {letter}")]
        found.append([ids[0] for ids in forms if len(ids) == 1])
        if not found[-1]:
            raise CorpusError(f"the tokenizer has no token for the letter {letter}: use the cloze form")
    return found
