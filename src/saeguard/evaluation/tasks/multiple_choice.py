"""`mcq` and `near`: multiple-choice questions on the topic and far from it, and on neighbouring topics.

The protocol `paper` keeps the questions that the unguarded model answers right under all 24 orders of their options and
scores the order as given, so that the unguarded model is at 100 % by construction; `plain` keeps all questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from saeguard.evaluation.mcq import Answer, Form, Question, answer_batch, question_batches, right_in_all_orders
from saeguard.evaluation.sources import QuestionSet
from saeguard.evaluation.subject import Opened
from saeguard.evaluation.task import Item, Measure, Record, Task, item_id
from saeguard.generate import REFUSAL

Protocol = Literal["plain", "paper"]
ACCURACY = Measure("accuracy", "rate", "share of questions answered right, of all of them", "knowledge")
REFUSED = Measure(
    "refused", "rate", "share of questions that were not answered but refused; they count as not right", "neutral"
)
ORDERS_AT_ONCE = 4


@dataclass(frozen=True)
class QuestionItem(Item):
    """A question of a domain."""

    question: Question

    @property
    def content(self) -> str:
        """The question."""
        return self.question.text


def question_items(sets: Sequence[QuestionSet]) -> list[QuestionItem]:
    """The questions of all sets as items."""
    return [
        QuestionItem(item_id(each.name, q.text, *q.choices), each.name, each.role, q)
        for each in sets
        for q in each.questions
    ]


@dataclass(frozen=True)
class MultipleChoice(Task):
    """Questions with options, in one form and by one protocol."""

    sets: tuple[QuestionSet, ...]
    name: str = "mcq"
    form: Form = "cloze"
    protocol: Protocol = "plain"
    measures: tuple[Measure, ...] = field(default=(ACCURACY, REFUSED), init=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The form and the protocol."""
        return {"form": self.form, "protocol": self.protocol}

    @property
    def filter(self) -> Task | None:
        """For the paper's protocol."""
        return AllOrders(self.sets) if self.protocol == "paper" else None

    def items(self) -> Sequence[QuestionItem]:
        """The questions of all sets."""
        return question_items(self.sets)

    def batches(self, tokenizer: Any, items: Sequence[QuestionItem]) -> list[list[QuestionItem]]:
        """Questions of like length together."""
        found = question_batches(tokenizer, [item.question for item in items], self.form)
        return [[items[i] for i in batch] for batch in found]

    def run(self, it: Opened, batch: Sequence[QuestionItem], seed: int) -> list[Record]:
        """Answer one batch."""
        answers = answer_batch(it.model, it.tokenizer, [item.question for item in batch], it.guard, self.form)
        return [_record(item, answer) for item, answer in zip(batch, answers, strict=True)]


@dataclass(frozen=True)
class AllOrders(MultipleChoice):
    """Which questions the unguarded model gets right under all 24 orders of their options."""

    name: str = "orders"

    def batches(self, tokenizer: Any, items: Sequence[QuestionItem]) -> list[list[QuestionItem]]:
        """A few at a time, so that little is lost when a run is killed."""
        return [list(items[i : i + ORDERS_AT_ONCE]) for i in range(0, len(items), ORDERS_AT_ONCE)]

    def run(self, it: Opened, batch: Sequence[QuestionItem], seed: int) -> list[Record]:
        """Try the orders, without a guardrail."""
        with it.paused() as model:
            kept = [right_in_all_orders(model, it.tokenizer, item.question) for item in batch]
        return [
            Record(item.id, item.domain, item.role, {"kept": float(one)}) for item, one in zip(batch, kept, strict=True)
        ]


def _record(item: QuestionItem, answer: Answer) -> Record:
    verdict, choices = answer.verdict, item.question.choices
    scores = {"accuracy": float(answer.right)} | ({} if verdict is None else {"refused": float(answer.refused)})
    return Record(
        item.id, item.domain, item.role, scores,
        None if verdict is None else verdict.triggered,
        None if verdict is None else verdict.statistic,
        {"prompt": item.question.text, "answer": REFUSAL if answer.refused else choices[answer.chosen],
         "reference": choices[item.question.answer]},
    )  # fmt: skip
