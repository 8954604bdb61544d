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
    """`keeps` is whether a model still has `share` of the utility `before`. With `share` 0 it always has."""

    batches: Sequence[Batch]
    share: float
    before: float

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch], share: float) -> StoppingRule:
        """The rule for a model that is not yet trained."""
        return cls(batches, share, utility(model, batches) if batches else math.nan)

    def keeps(self, model: nn.Module) -> tuple[bool, float]:
        """The decision and the utility. Without retain text it cannot be known, and training goes on."""
        if not self.batches or not self.share:
            return True, math.nan
        now = utility(model, self.batches)
        return now >= self.share * self.before, now
