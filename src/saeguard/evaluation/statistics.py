"""Figures one can trust: an interval on every figure, and a paired test on every difference.

    rate         share of items, Wilson interval (95 %); paired: exact McNemar test
    mean         mean over items, bootstrap interval; paired: bootstrap of the mean difference
    perplexity   exp(sum of nats / sum of tokens) over texts, bootstrap over texts; paired likewise

The bootstrap resamples items, `RESAMPLES` times, with a seed. A paired test compares two subjects on the same items, so
that what makes an item hard cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, ks_2samp, rankdata
from sklearn.metrics import roc_curve

from saeguard.calibration import Rate

Kind = Literal["rate", "mean", "perplexity"]
Columns = NDArray[np.float64]
RESAMPLES, CURVE_RESAMPLES = 2000, 500
LEVEL = 0.95
BLOCK = 200_000


@dataclass(frozen=True)
class Estimate:
    """A figure over n items with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A figure less the same figure of a reference, on the same n items: 95 % interval, p-value and its test."""

    value: float
    low: float
    high: float
    p: float
    test: str
    n: int


def estimate(kind: Kind, columns: Columns, seed: int) -> Estimate:
    """A figure from its columns (n, k): one of scores, or for `perplexity` nats and tokens."""
    if kind == "rate":
        rate = Rate(int(columns[:, 0].sum()), len(columns))
        return Estimate(rate.value, *rate.interval, rate.n)
    statistic = _STATISTICS[kind]
    low, high = _interval(_bootstrap(columns, statistic, seed))
    return Estimate(float(statistic(columns[None])[0]), low, high, len(columns))


def difference(kind: Kind, after: Columns, before: Columns, seed: int) -> Difference:
    """The figure of `after` less that of `before`, row by row the same items."""
    statistic, width = _STATISTICS[kind], after.shape[1]

    def change(rows: Columns) -> Columns:
        return statistic(rows[..., :width]) - statistic(rows[..., width:])

    both = np.concatenate([after, before], axis=1)
    draws = _bootstrap(both, change, seed)
    value, (low, high) = float(change(both[None])[0]), _interval(draws)
    if kind == "rate":
        return Difference(value, low, high, mcnemar(after[:, 0], before[:, 0]), "exact McNemar", len(both))
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    p = 1.0 if value == 0 and low == high else min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))
    return Difference(value, low, high, p, "paired bootstrap", len(both))


def mcnemar(after: Columns, before: Columns) -> float:
    """Two-sided exact p-value that as many items changed one way as the other."""
    gained, lost = int(((after > 0) & (before <= 0)).sum()), int(((after <= 0) & (before > 0)).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def same_distribution(first: Columns, second: Columns) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test."""
    return float(ks_2samp(first, second).pvalue)


def harmonic_mean(values: Columns) -> Columns:
    """Over the last axis; 0 where a value is 0."""
    with np.errstate(divide="ignore"):
        result: Columns = values.shape[-1] / (1 / values).sum(axis=-1)
    return result


def _mean(rows: Columns) -> Columns:
    result: Columns = rows[..., 0].mean(axis=-1)
    return result


def _perplexity(rows: Columns) -> Columns:
    result: Columns = np.exp(rows[..., 0].sum(axis=-1) / rows[..., 1].sum(axis=-1))
    return result


_STATISTICS: dict[str, Callable[[Columns], Columns]] = {"rate": _mean, "mean": _mean, "perplexity": _perplexity}


def _bootstrap(rows: Columns, statistic: Callable[[Columns], Columns], seed: int) -> Columns:
    """The statistic of resamples of the rows, `RESAMPLES` of them, drawn in blocks of bounded size."""
    generator = np.random.default_rng(seed)
    at_once = max(1, BLOCK // len(rows))
    found = []
    for start in range(0, RESAMPLES, at_once):
        size = (min(at_once, RESAMPLES - start), len(rows))
        found.append(statistic(rows[generator.integers(0, len(rows), size)]))
    return np.concatenate(found)


def _interval(draws: Columns) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def as_columns(rows: Any) -> Columns:
    """Rows of scores as (n, k)."""
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), -1)


def area_under_curve(positive: Columns, negative: Columns, seed: int) -> Estimate:
    """AUROC: how often a positive lies above a negative, ties by half; bootstrap interval over both groups."""
    generator = np.random.default_rng(seed)
    draws = np.array([
        _auroc(generator.choice(positive, len(positive)), generator.choice(negative, len(negative)))
        for _ in range(CURVE_RESAMPLES)
    ])  # fmt: skip
    return Estimate(_auroc(positive, negative), *_interval(draws), len(positive) + len(negative))


def roc_points(positive: Columns, negative: Columns) -> list[list[float]]:
    """Corners (false-positive rate, true-positive rate) as the threshold falls."""
    false, true, _ = roc_curve([1] * len(positive) + [0] * len(negative), np.concatenate([positive, negative]))
    return [[float(x), float(y)] for x, y in zip(false, true, strict=True)]


def _auroc(positive: Columns, negative: Columns) -> float:
    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    return float((ranks.sum() - len(positive) * (len(positive) + 1) / 2) / (len(positive) * len(negative)))


def bootstrap_estimate(
    groups: Sequence[Columns], statistic: Callable[[Sequence[Columns]], float], seed: int
) -> Estimate:
    """A statistic of several groups of items; its interval by resampling the items of each group."""
    generator = np.random.default_rng(seed)
    draws = np.array([
        statistic([rows[generator.integers(0, len(rows), len(rows))] for rows in groups])
        for _ in range(CURVE_RESAMPLES)
    ])  # fmt: skip
    return Estimate(statistic(groups), *_interval(draws), sum(map(len, groups)))


def relative(found: Estimate, base: float) -> Estimate:
    """In percent above or below a base."""
    value, low, high = (100 * (part - base) / base for part in (found.value, found.low, found.high))
    return Estimate(value, low, high, found.n)
