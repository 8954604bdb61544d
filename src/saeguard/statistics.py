"""`FeatureStatistics`: what is known of every feature after a corpus was read once, in four sums.

Over the valid tokens t of a corpus, for feature j with activation a_j(t):

    count = number of tokens      total_j = sum a_j       squares_j = sum a_j^2      fired_j = number with a_j > 0

The sums form a commutative monoid (`merge`), so a corpus may be read in any order and grouping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureStatistics:
    """Sums over tokens, float64 but for `fired` (int64); each (d_sae,)."""

    count: int
    total: Tensor
    squares: Tensor
    fired: Tensor

    @classmethod
    def empty(cls, d_sae: int) -> Self:
        """The neutral element of `merge`."""
        zero = torch.zeros(d_sae, dtype=torch.float64)
        return cls(0, zero, zero, torch.zeros(d_sae, dtype=torch.int64))

    @classmethod
    def of(cls, a: Tensor) -> Self:
        """The sums over the rows of feature activations (tokens, d_sae), valid tokens only."""
        return cls(
            count=len(a),
            total=a.sum(dim=0, dtype=torch.float64).cpu(),
            squares=torch.linalg.vector_norm(a, dim=0, dtype=torch.float64).square().cpu(),
            fired=torch.count_nonzero(a, dim=0).cpu(),
        )

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """The sums over both sets of tokens."""
        return FeatureStatistics(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            self.fired + other.fired,
        )

    @property
    def mean(self) -> Tensor:
        """E[a_j]."""
        return self.total / max(1, self.count)

    @property
    def second_moment(self) -> Tensor:
        """E[a_j^2], the Fisher information proxy of the paper."""
        return self.squares / max(1, self.count)

    @property
    def firing_rate(self) -> Tensor:
        """Share of tokens on which the feature is active."""
        return self.fired / max(1, self.count)

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {
            "count": torch.tensor(self.count),
            "total": self.total,
            "squares": self.squares,
            "fired": self.fired,
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The reverse of `tensors`."""
        return cls(int(tensors["count"]), tensors["total"], tensors["squares"], tensors["fired"])
