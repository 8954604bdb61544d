"""Reading the answer out of the model, white box: logit lens and a linear probe, at blocks behind the guard.

    lens     score of an option = mean log-probability of its tokens where the residual stream after a block goes
             straight through the last norm and the head (nostalgebraist 2020)
    probe    score of an option = logistic regression on the mean residual stream over its tokens, trained on dev
             questions to tell right from wrong options, on the very model that is attacked, guard and all

Each question is read once with each of its options.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from saeguard.attacks.attack import quiz
from saeguard.evaluation.provenance import items_fingerprint
from saeguard.evaluation.subject import Opened
from saeguard.evaluation.task import Item, Record, Task
from saeguard.evaluation.tasks.multiple_choice import QuestionItem
from saeguard.model import input_device, residual_streams, unembed
from saeguard.online.passes import only_the_last
from saeguard.windows import pad_rows, text_ids

BATCH = 4
REGULARISATION = 0.01


def layers_behind(guarded: int, last: int, count: int = 4) -> list[int]:
    """At most `count` blocks from the one after the guarded layer to the last, evenly spaced."""
    return sorted({int(layer) for layer in np.linspace(min(guarded + 1, last), last, count).round()})


@dataclass(frozen=True)
class _Seen:
    """A question with one of its options: residual streams by block (tokens, d_model) from the last token of the prompt
    on, and the ids of the option."""

    option: tuple[int, ...]
    streams: Mapping[int, Tensor]

    def lens(self, model: Any, layer: int) -> float:
        logits = unembed(model, self.streams[layer][:-1]).float().log_softmax(dim=-1)
        return float(logits[torch.arange(len(self.option)), list(self.option)].mean())

    def mean(self, layer: int) -> Tensor:
        return self.streams[layer][1:].float().mean(dim=0).cpu()


def with_options(tokenizer: Any, items: Sequence[QuestionItem]) -> tuple[list[list[int]], list[int]]:
    """Token ids of every question with each of its options, and where in them the option begins."""
    rows, starts = [], []
    for item in items:
        prompt = quiz(item.question.text).ids(tokenizer)
        for choice in item.question.choices:
            rows.append([*prompt, *text_ids(tokenizer, f" {choice}")])
            starts.append(len(prompt))
    return rows, starts


def _see(it: Opened, items: Sequence[QuestionItem], layers: Sequence[int]) -> list[list[_Seen]]:
    """Read every question of a batch with each of its options."""
    rows, starts = with_options(it.tokenizer, items)
    ids, mask = (part.to(input_device(it.model)) for part in pad_rows(rows))
    with only_the_last():
        streams = residual_streams(it.model, layers, ids, mask)
    seen = iter(
        _Seen(tuple(row[start:]), {layer: stream[i, start - 1 : len(row)] for layer, stream in streams.items()})
        for i, (row, start) in enumerate(zip(rows, starts, strict=True))
    )
    return [[next(seen) for _ in item.question.choices] for item in items]


def _record(item: QuestionItem, scores: Mapping[int, Sequence[float]], seconds: float) -> Record:
    """Which option each block chooses."""
    found: dict[str, float] = {"chance": 1 / len(item.question.choices), "seconds": seconds}
    for layer, its in scores.items():
        found[f"chosen {layer}"] = float(np.argmax(its))
        found[f"right {layer}"] = float(np.argmax(its) == item.question.answer)
    return Record(item.id, item.domain, item.role, found)


def at_layer(records: Sequence[Record], layer: int) -> list[Record]:
    """The records of one block, in the form of those of other attacks."""
    nothing = {"tokens": 0.0, "search_seconds": 0.0, "calls": 0.0}
    return [
        replace(record, scores={
            **nothing, "chance": record.scores["chance"], "seconds": record.scores["seconds"],
            "chosen": record.scores[f"chosen {layer}"], "accuracy": record.scores[f"right {layer}"],
        })
        for record in records
    ]  # fmt: skip


@dataclass(frozen=True)
class Lens(Task):
    """The logit lens after some blocks."""

    questions: tuple[QuestionItem, ...]
    layers: tuple[int, ...]
    name: str = field(default="lens", init=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The blocks."""
        return {"layers": self.layers}

    def items(self) -> Sequence[Item]:
        """The questions."""
        return self.questions

    def batches(self, tokenizer: Any, items: Sequence[QuestionItem]) -> list[list[QuestionItem]]:
        """A few at a time."""
        return _batches(items)

    def run(self, it: Opened, batch: Sequence[QuestionItem], seed: int) -> list[Record]:
        """Read one batch."""
        begun = time.monotonic()
        found = []
        with torch.inference_mode():
            for item, seen in zip(batch, _see(it, batch, self.layers), strict=True):
                found.append((item, {layer: [one.lens(it.model, layer) for one in seen] for layer in self.layers}))
        seconds = (time.monotonic() - begun) / len(batch)
        return [_record(item, scores, seconds) for item, scores in found]


@dataclass(frozen=True)
class AnswerProbe(Task):
    """A linear probe after some blocks, trained on other questions. It is trained and tried in one go."""

    questions: tuple[QuestionItem, ...]
    training: tuple[QuestionItem, ...]
    layers: tuple[int, ...]
    name: str = field(default="probe", init=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The blocks and the training questions."""
        return {"layers": self.layers, "training": items_fingerprint(self.training)}

    def items(self) -> Sequence[Item]:
        """The questions."""
        return self.questions

    def batches(self, tokenizer: Any, items: Sequence[QuestionItem]) -> list[list[QuestionItem]]:
        """All of them."""
        return [list(items)]

    def run(self, it: Opened, batch: Sequence[QuestionItem], seed: int) -> list[Record]:
        """Train, and try."""
        begun = time.monotonic()
        known, asked = (self._means(it, items) for items in (self.training, batch))
        right = [i == item.question.answer for item in self.training for i in range(len(item.question.choices))]
        scores: list[dict[int, list[float]]] = [{} for _ in batch]
        for layer in self.layers:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION, max_iter=2000))
            model.fit(torch.stack([row[layer] for its in known for row in its]).numpy(), right)
            for its, found in zip(asked, scores, strict=True):
                found[layer] = model.decision_function(torch.stack([row[layer] for row in its]).numpy()).tolist()
        seconds = (time.monotonic() - begun) / len(batch)
        return [_record(item, found, seconds) for item, found in zip(batch, scores, strict=True)]

    def _means(self, it: Opened, items: Sequence[QuestionItem]) -> list[list[dict[int, Tensor]]]:
        """By item, option and block: the mean residual stream over the option."""
        return [
            [{layer: one.mean(layer) for layer in self.layers} for one in seen]
            for batch in _batches(items)
            for seen in _see(it, batch, self.layers)
        ]


def _batches(items: Sequence[QuestionItem]) -> list[list[QuestionItem]]:
    return [list(items[i : i + BATCH]) for i in range(0, len(items), BATCH)]
