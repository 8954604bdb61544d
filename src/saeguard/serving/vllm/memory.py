"""What a rule remembers of each request: tensors with one row a slot, so that many requests are read at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saeguard.gate import NOTHING_READ, Density, Gate
from saeguard.online.intervention import Verdict
from saeguard.rule import Rule
from saeguard.sae.slim import SlimEncoder
from saeguard.tokens import TokenMasks

NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class RuleMemory:
    """A rule with its tensors on the layer's device, and its record of each slot.

    `state` (slots, s) is the gate's, `triggered` (slots,) whether it latched, `statistic` (slots,) the largest so far,
    `first` (slots,) the position at which it triggered, `counts` (slots, n) how often each feature was active.
    `mask` (n,) are the features that make a token hot.
    """

    rule: Rule
    encoder: SlimEncoder
    decoder: Tensor
    gate: Gate
    mask: Tensor
    state: Tensor
    triggered: Tensor
    statistic: Tensor
    first: Tensor
    counts: Tensor

    @classmethod
    def of(cls, rule: Rule, slots: int, device: torch.device) -> RuleMemory:
        """An empty memory of `slots` requests and of `NOBODY`."""
        gate, mask, room = rule.gate, rule.gate.clamped(len(rule.selected)), slots + 1
        if not isinstance(gate.scorer, Density):
            gate = replace(gate, scorer=replace(gate.scorer, weights=gate.scorer.weights.to(device)))
        return cls(
            rule, rule.encoder.to(device), rule.decoder[mask].to(device), gate, mask.to(device),
            state=gate.accumulator.start(room).to(device),
            triggered=torch.zeros(room, dtype=torch.bool, device=device),
            statistic=torch.full((room,), NOTHING_READ, dtype=torch.float64, device=device),
            first=torch.full((room,), NEVER, device=device),
            counts=torch.zeros(room, len(rule.selected), dtype=torch.int64, device=device),
        )  # fmt: skip

    def forget(self, slots: Tensor) -> None:
        """Make some slots (k,) as if nothing had been read."""
        self.state[slots] = self.gate.accumulator.start(1).to(self.state.device)
        self.triggered[slots] = False
        self.statistic[slots] = NOTHING_READ
        self.first[slots] = NEVER
        self.counts[slots] = 0

    def hot(self, active: Tensor, masks: TokenMasks) -> Tensor:
        """Hot tokens (batch, tokens) from `active` (batch, tokens, n)."""
        return (active & self.mask).any(dim=-1) & self.gate.eligible(masks)

    def delta(self, a: Tensor) -> Tensor:
        """The clamp's change (tokens, d_model) for activations (tokens, n)."""
        return self.rule.clamp.delta(a[..., self.mask], self.decoder)

    def verdict(self, name: str, slot: int) -> Verdict:
        """What was decided on the request of a slot so far."""
        first, counts = int(self.first[slot]), self.counts[slot].cpu()
        order = counts.sort(descending=True, stable=True)
        return Verdict(
            rule=name,
            statistic=float(self.statistic[slot]),
            threshold=self.rule.threshold,
            triggered=first != NEVER,
            first_token=None if first == NEVER else first,
            features=tuple(self.rule.features[i] for i, n in zip(order.indices, order.values, strict=True) if n > 0),
        )
