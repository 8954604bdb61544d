"""The stopping rule: train until held-out retain text suffers.

    utility = exp( - NLL ) on windows of retain text that are not trained on: the geometric mean probability of a token

Training stops at the first look at which it is below `keep_utility` times what it was before, and the state of the
look before that is the result. arXiv 2504.08192 (table 11) stops so at 90 % of the target model's utility on retain
questions of MUSE; texts take their place because they are there for every topic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from saeguard.baselines.likelihood import Batch, log_probabilities, predicted


def utility(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Geometric mean probability of a token of these batches, between 0 and 1; NaN of a broken model."""
    total, count, training = 0.0, 0, model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            total += float(log_probabilities(model, batch).double().sum())
            count += int(predicted(batch).sum())
    model.train(training)
    return math.exp(total / count)


@dataclass(frozen=True)
class StoppingRule:
    """Whether a model still has `share` of the utility `before`, of the batches. `before` is None without a rule."""

    batches: Sequence[Batch]
    share: float
    before: float | None

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch], share: float) -> StoppingRule:
        """The rule for a model that is not yet trained; none without retain text, or with share 0."""
        return cls(batches, share, utility(model, batches) if batches and share else None)

    def now(self, model: nn.Module) -> float | None:
        """The utility, where there is a rule."""
        return None if self.before is None else utility(model, self.batches)

    def allows(self, now: float | None) -> bool:
        """Whether training goes on. A utility that is NaN never suffices."""
        return self.before is None or now is None or now >= self.share * self.before
