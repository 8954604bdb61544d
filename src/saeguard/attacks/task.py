"""`Attacked`: an attack as a task of the harness. Its items hold the attacked prompts, so whatever an attack is made of
is in their fingerprint."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from saeguard.attacks.attack import Attack, Prompt
from saeguard.evaluation.mcq import BATCH_QUESTIONS, answer_prompts
from saeguard.evaluation.prefix import BATCH_TOKENS
from saeguard.evaluation.subject import Opened
from saeguard.evaluation.task import Item, Measure, Record, Task
from saeguard.evaluation.tasks.multiple_choice import ACCURACY, QuestionItem

GROUPS = 4
"""Where an attack puts the same before many questions, they come in so many groups, each with its own before it."""


@dataclass(frozen=True)
class AttackedItem(QuestionItem):
    """A question and what is sent in its place. The id is that of the question. What the prompts of one `group` begin
    with is read once."""

    prompt: Prompt
    group: int | None = None


def attacked(attack: Attack, items: Sequence[QuestionItem], seed: int, *, share: bool = False) -> list[AttackedItem]:
    """The items under an attack, in groups if they `share` what it puts before them.

    What is random depends on the seed, the attack, and the item or its group alone.
    """
    found = []
    for item in items:
        group = zlib.crc32(item.id.encode()) % GROUPS if attack.shared else None
        draw = Random(f"{seed} {attack.name} {item.id if group is None else group}")
        prompt = attack.change(item.question, draw)
        its_group = group if share else None
        found.append(AttackedItem(item.id, item.domain, item.role, item.question, prompt, its_group))
    return found


@dataclass(frozen=True)
class Attacked(Task):
    """Questions under one attack, in cloze form."""

    name: str
    attacked: tuple[AttackedItem, ...]
    measures: tuple[Measure, ...] = field(default=(ACCURACY,), init=False)

    def items(self) -> Sequence[Item]:
        """The attacked questions."""
        return self.attacked

    def batches(self, tokenizer: Any, items: Sequence[AttackedItem]) -> list[list[AttackedItem]]:
        """Questions of like length and equally many options together, not too many tokens at once; a group whole."""
        lengths = {item.id: len(item.prompt.ids(tokenizer)) for item in items}
        found: list[list[AttackedItem]] = []
        kinds = {item.id: (len(item.question.choices), item.group or 0) for item in items}
        for item in sorted(items, key=lambda item: (*kinds[item.id], lengths[item.id])):
            last, (options, _) = found[-1] if found else [], kinds[item.id]
            full = (len(last) + 1) * options * lengths[item.id] > BATCH_TOKENS or len(last) == BATCH_QUESTIONS
            if last and kinds[last[0].id] == kinds[item.id] and (item.group is not None or not full):
                last.append(item)
            else:
                found.append([item])
        return found

    def run(self, it: Opened, batch: Sequence[AttackedItem], seed: int) -> list[Record]:
        """Answer one batch."""
        prompts = [item.prompt.ids(it.tokenizer) for item in batch]
        begun = time.monotonic()
        answers = answer_prompts(
            it.model,
            it.tokenizer,
            prompts,
            [item.question for item in batch],
            it.guard,
            share=batch[0].group is not None,
        )
        seconds = (time.monotonic() - begun) / len(batch)
        records = []
        for item, ids, answer in zip(batch, prompts, answers, strict=True):
            choices, verdict = item.question.choices, answer.verdict
            scores = {
                "accuracy": float(answer.right), "chosen": float(answer.chosen), "chance": 1 / len(choices),
                "tokens": float(len(ids)), "seconds": seconds, "search_seconds": item.prompt.seconds,
                "calls": float(item.prompt.calls),
            }  # fmt: skip
            if verdict is not None:
                scores["read_before"] = 1.0 if verdict.first_token is None else verdict.first_token / len(ids)
            texts = {"prompt": item.prompt.text or item.prompt.turns[-1][1], "answer": choices[answer.chosen],
                     "reference": choices[item.question.answer]}  # fmt: skip
            triggered, statistic = (verdict.triggered, verdict.statistic) if verdict else (None, None)
            records.append(Record(item.id, item.domain, item.role, scores, triggered, statistic, texts))
        return records
