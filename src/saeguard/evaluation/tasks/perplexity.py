"""`perplexity`: how well a model predicts text of each domain, and what a guardrail changes in text it lets through.

    perplexity = exp(sum of nats / sum of tokens), over the first `max_tokens` tokens of every text
    KL         = mean over tokens of KL(model without guardrail || model with it), in nats

On text that does not trigger, KL must be exactly 0; `changed` counts the texts on which a bit of a logit differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saeguard.evaluation.generation import by_length
from saeguard.evaluation.sources import TextSet
from saeguard.evaluation.subject import Opened
from saeguard.evaluation.task import Item, Measure, Record, Task, item_id
from saeguard.windows import bos_ids

BATCH_TEXTS = 8
MEASURES = (
    Measure("perplexity", "perplexity", "perplexity of the text", "neutral", ("nats", "tokens")),
    Measure("KL, triggered", "mean", "nats a token between the model without and with the guardrail", "neutral",
            ("kl_triggered",)),
    Measure("KL, not triggered", "mean", "the same on text that did not trigger: must be exactly 0", "harm",
            ("kl_untriggered",)),
    Measure("changed", "rate", "share of texts that did not trigger and yet changed in a bit: must be exactly 0",
            "harm"),
)  # fmt: skip


@dataclass(frozen=True)
class TextItem(Item):
    """A text of a domain."""

    text: str

    @property
    def content(self) -> str:
        """The text."""
        return self.text


@dataclass(frozen=True)
class Perplexity(Task):
    """Texts by domain. Where `held_out` names a domain, only the documents of its test split count: the guardrail
    was fitted on the others."""

    sets: tuple[TextSet, ...]
    held_out: frozenset[str] = frozenset()
    max_tokens: int = 256
    name: str = "perplexity"
    measures: tuple[Measure, ...] = field(default=MEASURES, init=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Tokens of a text that count, and the domains of which only held-out documents are taken."""
        return {"max_tokens": self.max_tokens, "held_out": sorted(self.held_out)}

    def items(self) -> Sequence[TextItem]:
        """The documents of all sets."""
        return [
            TextItem(item_id(each.name, document.text), each.name, each.role, document.text)
            for each in self.sets
            for document in each.corpus.documents()
            if each.name not in self.held_out or document.split == "test"
        ]

    def batches(self, tokenizer: Any, items: Sequence[TextItem]) -> list[list[TextItem]]:
        """Texts of like length together; one of a single token has nothing to predict."""
        rows = {item.id: self._ids(tokenizer, item.text) for item in items}
        kept = [item for item in items if len(rows[item.id]) > 1]
        return [[kept[i] for i in batch] for batch in by_length([rows[item.id] for item in kept], BATCH_TEXTS)]

    def run(self, it: Opened, batch: Sequence[TextItem], seed: int) -> list[Record]:
        """Read one batch; under a guardrail also without it."""
        rows = [self._ids(it.tokenizer, item.text) for item in batch]
        logits = _logits(it.model, rows)
        verdicts = it.guard.verdicts if it.guard else None
        with it.paused() as model:
            plain = logits if verdicts is None else _logits(model, rows)
        records = []
        for i, item in enumerate(batch):
            mine, tokens = logits[i, : len(rows[i]) - 1].log_softmax(dim=-1), torch.tensor(rows[i][1:])
            nats = -mine.gather(1, tokens[:, None]).double().sum()
            scores = {"nats": float(nats), "tokens": float(len(tokens))}
            verdict = None if verdicts is None else verdicts[i]
            if verdict is not None:
                before = plain[i, : len(rows[i]) - 1]
                same = torch.equal(before, logits[i, : len(rows[i]) - 1])
                scores |= _changes(before.log_softmax(dim=-1), mine, same, verdict.triggered)
            records.append(
                Record(item.id, item.domain, item.role, scores, None if verdict is None else verdict.triggered,
                       None if verdict is None else verdict.statistic, {"prompt": item.text})
            )  # fmt: skip
        return records

    def _ids(self, tokenizer: Any, text: str) -> list[int]:
        start = bos_ids(tokenizer)
        ids = start + list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids[: self.max_tokens]


def _changes(before: Tensor, after: Tensor, same: bool, triggered: bool) -> dict[str, float]:
    """KL in nats a token, from log-probabilities (tokens, vocabulary)."""
    kl = float((before.exp() * (before - after)).sum(dim=-1).double().mean())
    if triggered:
        return {"kl_triggered": kl}
    return {"kl_untriggered": kl, "changed": float(not same)}


def _logits(model: Any, rows: Sequence[list[int]]) -> Tensor:
    """Logits (rows, tokens, vocabulary), padded on the right."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.float().cpu()
