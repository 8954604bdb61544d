"""The guard of one layer in an engine with continuous batching.

The decisions are those of `gate` and `clamp`; here is only which rows they are asked about. Requests that have
equally many tokens in a step are read together, so all that are generating take one call. Since a running gate is
causal, its decisions do not depend on how a prompt was cut into chunks. A rule that reaches back does so to the first
token of the chunk that triggers: what was read before cannot be read again here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from saeguard.errors import AttachError, NonFiniteError
from saeguard.online.intervention import Verdict
from saeguard.rule import Rule
from saeguard.serving.vllm.memory import NEVER, RuleMemory
from saeguard.serving.vllm.slots import Span
from saeguard.tokens import TokenMasks, token_masks


@dataclass(frozen=True)
class Group:
    """Requests with equally many tokens here: `slots` and `positions` (batch,), `rows` and masks (batch, tokens)."""

    slots: Tensor
    positions: Tensor
    rows: Tensor
    masks: TokenMasks

    @classmethod
    def of(cls, spans: Sequence[Span], ids: Tensor, special: Tensor) -> Group:
        """From spans of one length, and the token ids (tokens,) of the whole step."""
        columns = torch.tensor([(span.slot, span.start, span.position) for span in spans], device=ids.device)
        slots, starts, positions = columns.unbind(dim=1)
        rows = starts[:, None] + torch.arange(spans[0].length, device=ids.device)
        attended = torch.ones_like(rows, dtype=torch.bool)
        return cls(slots, positions, rows, token_masks(ids[rows], attended, special, started=positions > 0))


class LayerGuard:
    """The rules of one layer at work. `begin` says whose tokens come; the layer's output then goes through `guard`."""

    def __init__(
        self, layer: int, rules: Mapping[str, Rule], special: Sequence[int], *, slots: int, device: torch.device
    ) -> None:  # fmt: skip
        self.layer = layer
        self.memories = {name: RuleMemory.of(rule, slots, device) for name, rule in rules.items()}
        self.special = torch.tensor(special, device=device)
        self._groups: list[Group] | None = None

    def begin(self, spans: Sequence[Span], ids: Tensor) -> None:
        """Note whose tokens the next pass holds; `ids` (tokens,) of its rows. What starts over is forgotten first."""
        self._forget([span.slot for span in spans if span.position == 0])
        ordered = sorted(spans, key=lambda span: span.length)
        self._groups = [
            Group.of(list(some), ids, self.special) for _, some in groupby(ordered, lambda span: span.length)
        ]

    def guard(self, stream: Tensor) -> tuple[Tensor, Tensor] | None:
        """The residual stream (tokens, d_model) as it shall be, and the rows (tokens,) changed; None where none are.

        Rows that belong to no request are left as they are. Raises `AttachError` for a pass that was not announced.
        """
        if self._groups is None:
            raise AttachError(f"layer {self.layer} ran, but nothing was said of whose tokens these are")
        groups, self._groups = self._groups, None
        changed: tuple[Tensor, Tensor] | None = None
        for group in groups:
            hidden = stream[group.rows]
            if not bool(hidden.sum(dtype=torch.float32).isfinite()):
                raise NonFiniteError(f"the residual stream after layer {self.layer} holds NaN or infinite values")
            for memory in self.memories.values():
                a = memory.encoder(hidden)
                clamped = _read(memory, hidden, a, group)
                if memory.rule.clamps and bool(clamped.any()):
                    if changed is None:
                        changed = stream.float(), torch.zeros(len(stream), dtype=torch.bool, device=stream.device)
                    changed[0][group.rows] += torch.where(clamped[..., None], memory.delta(a), 0.0)
                    changed[1][group.rows] |= clamped
        return None if changed is None else (changed[0].to(stream.dtype), changed[1])

    def end(self) -> None:
        """After the pass. Raises `AttachError` where it did not go through the layer."""
        if self._groups is not None:
            raise AttachError(f"a step ran without its layer {self.layer}: nothing was guarded")

    def _forget(self, slots: Sequence[int]) -> None:
        for memory in self.memories.values() if slots else ():
            memory.forget(torch.tensor(slots, device=memory.state.device))

    def verdicts(self, slot: int) -> list[Verdict]:
        """The verdict of every rule on the request of a slot."""
        return [memory.verdict(name, slot) for name, memory in self.memories.items()]


def _read(memory: RuleMemory, hidden: Tensor, a: Tensor, group: Group) -> Tensor:
    """Advance the memory by a group's tokens; which of them (batch, tokens) are to be clamped."""
    slots, active = group.slots, a > 0
    state, statistics = memory.gate.read(memory.state[slots], hidden, active, group.masks)
    triggered = memory.gate.decide(statistics, memory.rule.threshold, memory.triggered[slots])
    memory.state[slots], memory.triggered[slots] = state[:, -1], triggered[:, -1]
    memory.statistic[slots] = memory.statistic[slots].maximum(memory.gate.sequence_statistic(statistics))
    memory.counts[slots] += (active & group.masks.valid[..., None]).sum(dim=1)
    here = torch.where(triggered.any(dim=1), group.positions + triggered.int().argmax(dim=1), NEVER)
    memory.first[slots] = memory.first[slots].minimum(here)
    if memory.rule.reaches_back:
        triggered = memory.triggered[slots, None]
    return memory.hot(active, group.masks) & triggered
