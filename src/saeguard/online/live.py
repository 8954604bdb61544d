"""A rule at work: its tensors on the layer's device, and what it does to one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard.gate import Density, Gate
from saeguard.online.sequences import RuleTrack
from saeguard.rule import Rule
from saeguard.sae.slim import SlimEncoder
from saeguard.tokens import TokenMasks


@dataclass(frozen=True)
class LiveRule:
    """A rule with its tensors on the layer's device; `acting` (k,) are the places of the features that make a token
    hot."""

    rule: Rule
    encoder: SlimEncoder
    decoder: Tensor
    gate: Gate
    acting: Tensor

    @classmethod
    def of(cls, rule: Rule, device: torch.device) -> LiveRule:
        """The rule on a device."""
        acting = rule.gate.clamped(len(rule.selected)).nonzero()[:, 0]
        decoder = rule.decoder[acting].to(device)
        return cls(rule, rule.encoder.to(device), decoder, _gate_to(rule.gate, device), acting.to(device))

    def read(self, hidden: Tensor, a: Tensor, masks: TokenMasks, past: RuleTrack | None) -> RuleTrack:
        """Gate state, statistic and decision after each token of this pass; nothing is clamped yet."""
        batch = len(hidden)
        state = self.gate.accumulator.start(batch) if past is None else past.states[:, -1]
        already = hidden.new_zeros(batch, dtype=torch.bool) if past is None else past.triggered[:, -1]
        states, statistics = self.gate.read(state.to(hidden.device), hidden.detach(), a > 0, masks)
        triggered = self.gate.decide(statistics, self.rule.threshold, already)
        return RuleTrack(states, statistics, triggered, torch.zeros_like(triggered))

    def hot(self, a: Tensor, masks: TokenMasks) -> Tensor:
        """Hot tokens (batch, tokens)."""
        return (a.index_select(-1, self.acting) > 0).any(dim=-1) & self.gate.eligible(masks)

    def delta(self, a: Tensor) -> Tensor:
        """The clamp's change (batch, tokens, d_model) for activations (batch, tokens, n)."""
        return self.rule.clamp.delta(a.index_select(-1, self.acting), self.decoder)


def _gate_to(gate: Gate, device: torch.device) -> Gate:
    scorer = gate.scorer
    if isinstance(scorer, Density):
        return gate
    moved = type(scorer)(scorer.weights.to(device), scorer.bias)
    return Gate(moved, gate.accumulator, gate.moment, gate.counts, gate.latch)


def changes(
    rules: Sequence[LiveRule], activations: Sequence[Tensor], masks: TokenMasks, clamped: Sequence[Tensor]
) -> tuple[Tensor, Tensor] | None:
    """The clamps' change (batch, tokens, d_model) and where it is (batch, tokens), given the tokens that each rule
    clamps if they are hot; None where there is none."""
    delta, where = None, torch.zeros_like(masks.attended)
    for rule, a, its in zip(rules, activations, clamped, strict=True):
        hot = rule.hot(a, masks) & its
        if bool(hot.any()):
            change = torch.where(hot[..., None], rule.delta(a), 0.0)
            delta = change if delta is None else delta + change
            where |= hot
    return None if delta is None else (delta, where)
