"""The rows that are written together, as tensors: one forward pass for all of them.

Rows are padded on the left, in the attention mask, the KV cache and the guards' tracks alike, so that they end at one
position; each counts its positions from its own first token. A row joins by padding the shorter side, and leaves by
taking its line out of every tensor, with the padding that then is common to all.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saeguard.online.sequences import check_joinable, cut_left, join, new_cache
from saeguard.serving.job import FinishReason, Row
from saeguard.serving.readings import Guards, Reading, TokenReading


class Batch:
    """Rows with their cache and attention mask (rows, positions). Not empty."""

    def __init__(self, model: Any, guards: Guards, rows: Sequence[Row], *, pad: int) -> None:
        self.rows = list(rows)
        self._model, self._guards = model, guards
        self._cache, self._checked = new_cache(), False
        width = max(len(row.job.ids) for row in rows)
        gaps = [width - len(row.job.ids) for row in rows]
        ids = [[pad] * gap + list(row.job.ids) for gap, row in zip(gaps, rows, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
        self._next = torch.tensor(ids, device=model.device)
        self._mask = torch.tensor(mask, device=model.device)
        self._options = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}

    def forward(self) -> Tensor:
        """Logits (rows, vocabulary) after the prompts, at first, or after the tokens drawn last. float32."""
        self._guards.arm([row.job.guardrails for row in self.rows])
        tokens = self._next.shape[1]
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens:]
        out = self._model(
            input_ids=self._next, attention_mask=self._mask, position_ids=positions,
            past_key_values=self._cache, use_cache=True, **self._options,
        )  # fmt: skip
        if not self._checked:
            check_joinable(self._cache)
            self._checked = True
            lengths = self._mask.sum(dim=1).tolist()
            for row, its in zip(self.rows, self._guards.at_prompts(lengths), strict=True):
                row.at_prompt = its
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def refused(self) -> list[bool]:
        """The rows on which a guardrail of the action `refuse` has triggered so far."""
        return self._guards.refused(
            self._cache, [row.job.guardrails for row in self.rows], [row.at_prompt for row in self.rows]
        )

    def readings(self, row: int) -> tuple[Reading, ...]:
        """What the guardrails have read in a row so far."""
        its = self.rows[row]
        return self._guards.readings(self._cache, len(self.rows), row, its.job.guardrails, its.at_prompt)

    def trace(self, row: int) -> tuple[tuple[int, tuple[TokenReading, ...]], ...]:
        """The tokens of a row in the last pass, each with what every guardrail read there."""
        ids = self._next[row]
        attended = self._mask[row, -len(ids) :].bool()
        read = self._guards.trace(self._cache, len(self.rows), row, attended, self.rows[row].at_prompt)
        return tuple(zip(ids[attended].tolist(), read, strict=True))

    def extend(self) -> None:
        """Make each row's last token the next input."""
        self._next = torch.tensor([[row.last] for row in self.rows], device=self._mask.device)
        self._mask = torch.cat([self._mask, torch.ones_like(self._next)], dim=1)

    def keep(self, places: Sequence[int]) -> None:
        """Only the rows at these places stay, at least one."""
        if len(places) == len(self.rows):
            return
        index = torch.tensor(places, device=self._mask.device)
        self.rows = [self.rows[place] for place in places]
        self._next, self._mask = self._next[index], self._mask[index]
        self._cache.batch_select_indices(index)
        padding = int((self._mask.cumsum(dim=1) == 0).sum(dim=1).min())
        self._mask = self._mask[:, padding:]
        cut_left(self._cache, padding)

    def join(self, other: Batch) -> None:
        """Take in the rows of another batch. Both have been extended."""
        width = max(self._mask.shape[1], other._mask.shape[1])
        masks = (torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask, other._mask))
        self._mask = torch.cat(list(masks))
        self._next = torch.cat([self._next, other._next])
        self.rows += other.rows
        join(self._cache, other._cache)

    def finish(self, row: int, reason: FinishReason) -> None:
        """Tell a row's end, with what was read in it."""
        self.rows[row].finish(reason, self.readings(row))


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model can leave out the logits of all positions but the last."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters
