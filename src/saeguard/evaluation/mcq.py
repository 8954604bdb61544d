"""Multiple-choice questions in cloze form: which option does the model find likeliest as an answer?

    score of an option = mean log-probability of its tokens after the prompt

Options are read on from their prompt's cache. The same batches are run with and without a guardrail, so that a
question that does not trigger is scored on the very same bits. Chance is 1 / number of options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from saeguard.calibration import Rate
from saeguard.corpus import read_rows
from saeguard.errors import CorpusError
from saeguard.guardrail import Guardrail
from saeguard.intervention import Guard
from saeguard.windows import bos_ids

PROMPT = "Quiz\nQuestion: {question}\nAnswer:"
BATCH_QUESTIONS = 16


@dataclass(frozen=True)
class Question:
    """A question, its options and the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Answer:
    """What the model chose, whether that is right, and whether the question itself triggered the guardrail."""

    chosen: int
    right: bool
    triggered: bool


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a `.jsonl[.gz]` file with `question`, `choices` and `answer` (index). Raises `CorpusError`."""
    path = Path(path)
    if not path.is_file():
        raise CorpusError(f"no such file: {path}")
    return [_question(row, f"{path}, question {number}") for number, row in enumerate(read_rows(path), 1)]


def _question(row: dict[str, Any], where: str) -> Question:
    text, choices, answer = (row.get(name) for name in ("question", "choices", "answer"))
    good = isinstance(text, str) and isinstance(choices, list) and isinstance(answer, int)
    if not good or not all(isinstance(c, str) for c in choices) or not 0 <= answer < len(choices):  # type: ignore[union-attr,operator,arg-type]
        raise CorpusError(f"{where}: expected a text `question`, a list of texts `choices`, and the index `answer`")
    return Question(text, tuple(choices), answer)  # type: ignore[arg-type]


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    guardrail: Guardrail | None = None,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """Answer every question, in order, with the guardrail attached if there is one."""
    encoded = [_Encoded.of(tokenizer, question) for question in questions]
    answers: dict[int, Answer] = {}
    with nullcontext() if guardrail is None else guardrail.attach(model, tokenizer) as guard:
        for some in _batches(encoded):
            batch = [encoded[i] for i in some]
            answers |= zip(some, _answer(model, batch, guard), strict=True)
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


@dataclass(frozen=True)
class _Encoded:
    """A question as token ids: the prompt, and each option that may follow it."""

    prompt: list[int]
    options: list[list[int]]
    answer: int

    @classmethod
    def of(cls, tokenizer: Any, question: Question) -> _Encoded:
        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        prompt = bos_ids(tokenizer) + ids(PROMPT.format(question=question.text))
        return cls(prompt, [ids(f" {choice}") for choice in question.choices], question.answer)


def _answer(model: Any, batch: list[_Encoded], guard: Guard | None) -> list[Answer]:
    """Read the prompts once, then every option on from its prompt's cache."""
    prompts, mask = _pad([question.prompt for question in batch], left=True)
    prompts, mask = prompts.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        read = model(input_ids=prompts, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        triggered = [verdict.triggered for verdict in guard.verdicts] if guard else [False] * len(batch)
        first = read.logits[:, -1].float().log_softmax(dim=-1).cpu()
        later = _continue(model, batch, mask, read.past_key_values)
    answers, row = [], 0
    for place, question in enumerate(batch):
        scores = []
        for option in question.options:
            rest = later[row][torch.arange(len(option) - 1), torch.tensor(option[1:], dtype=torch.long)]
            scores.append(float((first[place, option[0]] + rest.sum()) / len(option)))
            row += 1
        chosen = max(range(len(scores)), key=scores.__getitem__)
        answers.append(Answer(chosen, chosen == question.answer, triggered[place]))
    return answers


def _continue(model: Any, batch: list[_Encoded], mask: Tensor, cache: Cache) -> Tensor:
    """Log-probabilities (options of all questions, tokens, vocabulary) after each option token but the last."""
    per_question = len(batch[0].options)
    options, option_mask = _pad([option for question in batch for option in question.options], left=False)
    options, option_mask = options[:, :-1].to(model.device), option_mask[:, :-1].to(model.device)
    if options.shape[1] == 0:
        return torch.empty(len(options), 0, 0)
    cache.batch_repeat_interleave(per_question)
    mask = mask.repeat_interleave(per_question, dim=0)
    positions = mask.sum(dim=1, keepdim=True) + torch.arange(options.shape[1], device=mask.device)
    out = model(
        input_ids=options, attention_mask=torch.cat([mask, option_mask], dim=1), position_ids=positions,
        past_key_values=cache, use_cache=True,
    )  # fmt: skip
    logits: Tensor = out.logits
    return logits.float().log_softmax(dim=-1).cpu()


def _pad(rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, its in enumerate(rows):
        where = slice(width - len(its), width) if left else slice(len(its))
        ids[row, where], mask[row, where] = torch.tensor(its), 1
    return ids, mask


def _batches(encoded: list[_Encoded]) -> Iterator[list[int]]:
    """Indices of questions of like length and equally many options, `BATCH_QUESTIONS` at a time."""
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].options), len(encoded[i].prompt)))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == BATCH_QUESTIONS or len(encoded[i].options) != len(encoded[batch[0]].options)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
