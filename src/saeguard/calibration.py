"""From gate statistics of held-out retain sequences to a threshold, and the evidence for it.

    percentile (the paper)   the `p_dyn` percentile of the retain statistics
    conformal                the k-th smallest of n with k = ceil((n + 1)(1 - alpha)): a new exchangeable retain
                             sequence triggers with probability at most alpha (split conformal prediction)
    fixed                    a threshold that is given; nothing is promised

Conformal bounds are found for each named corpus and for each window length, and the largest is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from saeguard.errors import TooFewSequencesError


@dataclass(frozen=True)
class Percentile:
    """The paper's threshold."""

    p_dyn: float = 95.0


@dataclass(frozen=True)
class Conformal:
    """Split conformal at level alpha, for each corpus and length; with `per_1000` also at most so many false alarms in
    1,000 tokens of each corpus (`saeguard.longrun`)."""

    alpha: float = 0.05
    per_1000: float | None = None


@dataclass(frozen=True)
class Fixed:
    """A threshold that is given, not calibrated."""

    threshold: float


Method = Percentile | Conformal | Fixed


@dataclass(frozen=True)
class Rate:
    """A share of sequences with its 95 % Wilson interval."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """hits / n (0 of 0 is 0)."""
        return self.hits / self.n if self.n else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson score interval at 95 %."""
        if not self.n:
            return 0.0, 1.0
        found = binomtest(self.hits, self.n).proportion_ci(method="wilson")
        return float(found.low), float(found.high)

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """For JSON."""
        return {"rate": self.value, "hits": self.hits, "n": self.n, "interval": list(self.interval)}


def rate_above(statistics: Iterable[float], threshold: float) -> Rate:
    """How many of the statistics are above the threshold."""
    values = np.asarray(list(statistics))
    return Rate(int((values > threshold).sum()), len(values))


@dataclass(frozen=True)
class Bound:
    """The threshold that one group of retain sequences asks for."""

    group: str
    n: int
    value: float


@dataclass(frozen=True)
class Calibration:
    """A threshold, and the bounds of which it is the largest."""

    threshold: float
    method: Method
    bounds: tuple[Bound, ...]


def conformal_bound(statistics: Sequence[float], alpha: float, *, group: str) -> float:
    """The k-th smallest statistic. Raises `TooFewSequencesError` where k exceeds n."""
    n = len(statistics)
    k = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    if k > n:
        raise TooFewSequencesError.mismatch(
            f"calibration sequences of the retain corpus {group!r} for alpha = {alpha}",
            found=n,
            expected=f"at least {math.ceil(1 / alpha - 1e-9) - 1}",
            fix="Give more text, or a larger --alpha.",
        )
    return float(np.partition(np.asarray(statistics, dtype=float), k - 1)[k - 1])


def calibrate(
    retain: Mapping[str, Sequence[float]], method: Method, *, by_length: Mapping[int, Sequence[float]] | None = None,
    long_run: Sequence[Bound] = (),
) -> Calibration:  # fmt: skip
    """A threshold from the statistics of held-out retain sequences, by corpus name (and by window length), not below
    the bounds that long text asks for."""
    if isinstance(method, Fixed):
        return Calibration(method.threshold, method, ())
    if isinstance(method, Percentile):
        pooled = [value for statistics in retain.values() for value in statistics]
        if not pooled:
            raise TooFewSequencesError("no retain sequence to calibrate on: give more text")
        value = float(np.percentile(pooled, method.p_dyn))
        return Calibration(value, method, (Bound("all", len(pooled), value),))
    bounds = [
        Bound(name, len(statistics), conformal_bound(statistics, method.alpha, group=name))
        for name, statistics in retain.items()
    ]
    bounds += [
        Bound(f"{length} tokens", len(statistics), conformal_bound(statistics, method.alpha, group=f"{length} tokens"))
        for length, statistics in (by_length or {}).items()
        if len(statistics) >= 1 / method.alpha - 1
    ]
    bounds += long_run
    return Calibration(max(bound.value for bound in bounds), method, tuple(bounds))
