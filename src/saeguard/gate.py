"""The gate: from what each token shows to the decision on its sequence. The only implementation.

A gate is a token score and a way to accumulate it:

    density    score = 1 if a selected feature is active, else 0                    (the paper)
    evidence   score = sum_j w_j 1[a_j > 0] + bias                                  (learned weights)
    probe      score = w . h + bias                                                 (no SAE)
    Mean       statistic = mean of the scores over the counted tokens               (the paper)
    Cusum      statistic = S, where S <- max(0, S + score - drift) at each token     (Page 1954)

and a moment: `running` decides at every token on what was read so far, so the decision is a causal
function of the tokens, the same whether they come at once, in chunks, cached or one by one; `block` decides
once for all tokens of a forward pass, from its end (the paper: prompt tokens are clamped by the whole prompt).
Cusum finds a burst anywhere: ordinary text in front of it, such as a chat template, dilutes nothing.
Another sequential gate is another accumulator with `start` and `advance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saeguard.choices import Moment
from saeguard.tokens import TokenMasks

NOTHING_READ = float("-inf")


@dataclass(frozen=True)
class Density:
    """1 at hot tokens."""

    def scores(self, hidden: Tensor, active: Tensor) -> Tensor:
        """(batch, tokens) from `active` (batch, tokens, n)."""
        return active.any(dim=-1).double()


@dataclass(frozen=True)
class Evidence:
    """Learned weights (n,) over the selected features."""

    weights: Tensor
    bias: float

    def scores(self, hidden: Tensor, active: Tensor) -> Tensor:
        """(batch, tokens) from `active` (batch, tokens, n)."""
        return active.double() @ self.weights.double() + self.bias


@dataclass(frozen=True)
class Probe:
    """A linear probe (d_model,) on the residual stream itself."""

    weights: Tensor
    bias: float

    def scores(self, hidden: Tensor, active: Tensor) -> Tensor:
        """(batch, tokens) from `hidden` (batch, tokens, d_model)."""
        return (hidden.float() @ self.weights.float()).double() + self.bias


Scorer = Density | Evidence | Probe


@dataclass(frozen=True)
class Mean:
    """Running mean of the scores. State: (sum, number of tokens).

    Before the first counted token the statistic is minus infinity, which is above no threshold.
    """

    def start(self, batch: int) -> Tensor:
        """The state (batch, 2) of sequences of which nothing was read."""
        return torch.zeros(batch, 2, dtype=torch.float64)

    def advance(self, state: Tensor, scores: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """State (batch, tokens, 2) and statistic (batch, tokens) after each token."""
        steps = torch.stack([torch.where(counted, scores, 0.0), counted.double()], dim=-1)
        states = state[:, None].to(steps.device) + steps.cumsum(dim=1)
        total, count = states.unbind(dim=-1)
        return states, torch.where(count > 0, total / count, NOTHING_READ)

    def of_block(self, statistics: Tensor) -> Tensor:
        """The statistic (batch,) of a whole block: the mean after its last token."""
        return statistics[:, -1]


@dataclass(frozen=True)
class Cusum:
    """Cumulative sum of the scores less `drift`, never below 0. State: (S,)."""

    drift: float

    def start(self, batch: int) -> Tensor:
        """The state (batch, 1) of sequences of which nothing was read."""
        return torch.zeros(batch, 1, dtype=torch.float64)

    def advance(self, state: Tensor, scores: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """State (batch, tokens, 1) and statistic (batch, tokens) after each token.

        S_t is the walk W_t = S_0 + sum of steps, less its lowest value so far where that is below 0.
        """
        walk = state.to(scores.device) + torch.where(counted, scores - self.drift, 0.0).cumsum(dim=1)
        sums = walk - walk.cummin(dim=1).values.clamp(max=0)
        return sums[..., None], sums

    def of_block(self, statistics: Tensor) -> Tensor:
        """The statistic (batch,) of a whole block: the largest sum in it."""
        return statistics.amax(dim=1)


Accumulator = Mean | Cusum


@dataclass(frozen=True)
class Gate:
    """A scorer, an accumulator and the moment of the decision; above the threshold is triggered.

    `counts` says which tokens enter the statistic: the valid ones, or (`attended`, as in the authors' code) all
    but padding, of which then all but the first can be hot. `latch`: once triggered, triggered to the end.
    """

    scorer: Scorer
    accumulator: Accumulator = Mean()
    moment: Moment = "running"
    counts: Literal["valid", "attended"] = "valid"
    latch: bool = True

    @property
    def kind(self) -> str:
        """`density`, `evidence` or `probe`."""
        return type(self.scorer).__name__.lower()

    def clamped(self, n: int) -> Tensor:
        """Mask (n,) of the features that make a token hot and are clamped: under evidence, those of positive weight."""
        if isinstance(self.scorer, Evidence):
            return self.scorer.weights.cpu() > 0
        return torch.ones(n, dtype=torch.bool)

    def always(self, threshold: float) -> bool:
        """Whether it triggers at the first token that counts, whatever that is: no density is below 0."""
        return isinstance(self.scorer, Density) and threshold < 0

    def eligible(self, masks: TokenMasks) -> Tensor:
        """Tokens (batch, tokens) that can be hot."""
        return masks.valid if self.counts == "valid" else masks.attended & ~masks.first

    def read(self, state: Tensor, hidden: Tensor, active: Tensor, masks: TokenMasks) -> tuple[Tensor, Tensor]:
        """State and statistic after each token of a block, from `active` (batch, tokens, n)."""
        return self.accumulator.advance(state, *self.scored(hidden, active, masks))

    def scored(self, hidden: Tensor, active: Tensor, masks: TokenMasks) -> tuple[Tensor, Tensor]:
        """The score of each token (batch, tokens), and which tokens are counted."""
        scores = self.scorer.scores(hidden, active & self.eligible(masks)[..., None])
        return scores, masks.valid if self.counts == "valid" else masks.attended

    def decide(self, statistics: Tensor, threshold: float, already: Tensor) -> Tensor:
        """Triggered (batch, tokens) after each token of a block; `already` (batch,) was so before it."""
        over = statistics > threshold
        if self.moment == "block":
            over = (self.accumulator.of_block(statistics) > threshold)[:, None].expand_as(over)
        if not self.latch:
            return over
        return (over.cumsum(dim=1) > 0) | already[:, None]

    def sequence_statistic(self, statistics: Tensor) -> Tensor:
        """The number (batch,) whose passing of the threshold triggers a sequence read in one block."""
        return self.accumulator.of_block(statistics) if self.moment == "block" else statistics.amax(dim=1)
