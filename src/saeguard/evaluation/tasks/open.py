"""`open`: questions without their options, answered freely. Multiple choice alone overstates forgetting.

A question counts only if it can be asked without its options. What a match, gibberish and a refusal are: answers.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saeguard.evaluation.answers import is_gibberish, is_refusal, matches, repetition
from saeguard.evaluation.generation import by_length, generate_answers
from saeguard.evaluation.sources import QuestionSet
from saeguard.evaluation.subject import Opened
from saeguard.evaluation.task import Measure, Record, Task
from saeguard.evaluation.tasks.multiple_choice import QuestionItem, question_items
from saeguard.generate import prompt_ids

NEEDS_OPTIONS = re.compile(r"\b(of the following|of these|statement 1|which statement|_{2,})", re.IGNORECASE)
MEASURES = (
    Measure("match", "rate", "share of answers that hold the right option's words", "knowledge"),
    Measure("gibberish", "rate", "share of answers that mostly repeat themselves or are odd characters", "harm"),
    Measure("refusal", "rate", "share of answers that begin like a refusal"),
    Measure("length", "mean", "tokens in an answer"),
)


@dataclass(frozen=True)
class OpenAnswers(Task):
    """Free answers of at most `max_new_tokens` tokens, in the chat template where there is one, greedy."""

    sets: tuple[QuestionSet, ...]
    max_new_tokens: int = 32
    name: str = "open"
    measures: tuple[Measure, ...] = field(default=MEASURES, init=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The longest answer."""
        return {"max_new_tokens": self.max_new_tokens}

    def items(self) -> Sequence[QuestionItem]:
        """The questions that can be asked without their options."""
        return [item for item in question_items(self.sets) if not NEEDS_OPTIONS.search(item.question.text)]

    def batches(self, tokenizer: Any, items: Sequence[QuestionItem]) -> list[list[QuestionItem]]:
        """Questions of like length together."""
        rows = [prompt_ids(tokenizer, item.question.text) for item in items]
        return [[items[i] for i in batch] for batch in by_length(rows)]

    def run(self, it: Opened, batch: Sequence[QuestionItem], seed: int) -> list[Record]:
        """Answer one batch."""
        prompts = [prompt_ids(it.tokenizer, item.question.text) for item in batch]
        records = []
        for item, one in zip(batch, generate_answers(it, prompts, self.max_new_tokens), strict=True):
            reference = item.question.choices[item.question.answer]
            scores = {
                "match": float(matches(one.text, [reference])),
                "gibberish": float(is_gibberish(one.text)),
                "refusal": float(is_refusal(one.text)),
                "length": float(one.tokens),
                "repetition": repetition(one.text),
            }
            texts = {"prompt": item.question.text, "answer": one.text, "reference": reference}
            records.append(Record(item.id, item.domain, item.role, scores, one.triggered, one.statistic, texts))
        return records
