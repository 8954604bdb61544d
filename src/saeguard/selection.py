"""From statistics of the corpora to the few features that tell forget from retain.

    second_moment (the paper):       score = E[a_j^2]
    squared_mean  (authors' code):   score = (E[a_j])^2, with E[a_j] rounded to 6 decimals in preset `paper`
    ratio_j = forget_j / max(retain_j, floor x max_i retain_i)      (authors: forget_j / (retain_j + 1e-21))

With several retain corpora the retain score is the worst case (maximum over corpora) or pooled.
Kept: forget score at or above its 5th percentile and ratio at or above its `p_ratio` percentile; then
the n of highest forget score (facts: the authors' code, A2 and A3).
With a retain threshold (Farrell et al., arXiv 2410.19278): of the features that fire at no more than that share of
retain tokens, the n that fire most often on forget text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from saeguard.choices import GivenFeatures
from saeguard.errors import SelectionError
from saeguard.statistics import FeatureStatistics

FORGET_PERCENTILE = 5.0
AUTHORS_EPSILON = 1e-21


@dataclass(frozen=True)
class SelectionRule:
    """How features are chosen."""

    n: int = 40
    """Number of features taken."""
    p_ratio: float = 95.0
    """Percentile of the importance ratio a feature must reach."""
    score: Literal["second_moment", "squared_mean"] = "second_moment"
    """The feature score."""
    retain: Literal["worst", "pooled"] = "worst"
    """How several retain corpora become one retain score."""
    floor: float = 1e-4
    """Smallest retain score in the ratio, relative to the largest retain score of any feature."""
    as_authors: bool = False
    """Round means to 6 decimals and add 1e-21 instead of the floor, as the authors' code does."""
    retain_rate: float | None = None
    """The retain threshold: the largest share of retain tokens at which a feature may fire, in place of the ratio."""


@dataclass(frozen=True)
class SelectedFeature:
    """One feature, and why it was taken: its scores, ratio, and firing rate in each corpus.

    Without forget text there is no forget score and no ratio. `explanation` is what a given feature was found by.
    """

    id: int
    forget_score: float | None
    retain_score: float
    ratio: float | None
    firing_rates: Mapping[str, float]
    explanation: str | None = None


def score(statistics: FeatureStatistics, rule: SelectionRule) -> Tensor:
    """The score of every feature on one corpus (d_sae,), float64."""
    if rule.score == "second_moment":
        return statistics.second_moment
    mean = statistics.mean.float().double().mul(1e6).round().div(1e6) if rule.as_authors else statistics.mean
    return mean.square()


def retain_score(retain: Mapping[str, FeatureStatistics], rule: SelectionRule) -> Tensor:
    """The retain score (d_sae,): the maximum over the corpora, or over their tokens pooled."""
    if rule.retain == "pooled":
        return score(reduce(FeatureStatistics.merge, retain.values()), rule)
    return torch.stack([score(statistics, rule) for statistics in retain.values()]).amax(dim=0)


def retain_rate(retain: Mapping[str, FeatureStatistics], rule: SelectionRule) -> Tensor:
    """Share of retain tokens at which each feature fires (d_sae,): the maximum over the corpora, or pooled."""
    if rule.retain == "pooled":
        return reduce(FeatureStatistics.merge, retain.values()).firing_rate
    return torch.stack([statistics.firing_rate for statistics in retain.values()]).amax(dim=0)


def importance_ratio(forget: Tensor, retain: Tensor, rule: SelectionRule) -> Tensor:
    """forget / retain of every feature, kept finite by the rule's floor."""
    if rule.as_authors:
        return forget / (retain + AUTHORS_EPSILON)
    return forget / retain.clamp(min=max(rule.floor * float(retain.max()), torch.finfo(torch.float64).tiny))


def select(
    forget: FeatureStatistics, retain: Mapping[str, FeatureStatistics], rule: SelectionRule
) -> list[SelectedFeature]:
    """The features that pass the rule, by falling forget score (or firing rate). Raises `SelectionError`."""
    if rule.retain_rate is None:
        rank, limit = score(forget, rule), f"lower --p-ratio (now {rule.p_ratio})"
        ratio = importance_ratio(rank, retain_score(retain, rule), rule)
        keep = (rank >= percentile(rank, FORGET_PERCENTILE)) & (ratio >= percentile(ratio, rule.p_ratio))
    else:
        rank, limit = forget.firing_rate, f"raise --retain-rate (now {rule.retain_rate})"
        keep = retain_rate(retain, rule) <= rule.retain_rate
    ids = (keep & (rank > 0)).nonzero().flatten()
    if len(ids) < rule.n:
        raise SelectionError.mismatch(
            "features that pass selection",
            found=len(ids),
            expected=f"at least n = {rule.n}",
            fix=f"Ask for fewer (--n {max(1, len(ids))}) or {limit}.",
        )
    order = rank[ids].sort(descending=True, stable=True).indices
    return describe(ids[order[: rule.n]].tolist(), forget, retain, rule)


def take(
    given: GivenFeatures, forget: FeatureStatistics | None, retain: Mapping[str, FeatureStatistics], rule: SelectionRule
) -> list[SelectedFeature]:
    """The given features in their order, whatever their scores. Raises `SelectionError` for ids that cannot be."""
    d_sae = len(next(iter(retain.values())).fired)
    if foreign := [j for j in given.ids if not 0 <= j < d_sae]:
        raise SelectionError.mismatch(
            "ids of the given features", found=foreign[:8], expected=f"0 to {d_sae - 1}",
            fix="They are of another SAE: use the ids of this one.",
        )  # fmt: skip
    if not given.ids or len(set(given.ids)) < len(given.ids):
        raise SelectionError(f"the given features are {list(given.ids)}: expected at least one, and each of them once")
    return [
        replace(one, explanation=given.explanations.get(one.id)) for one in describe(given.ids, forget, retain, rule)
    ]


def describe(
    ids: Sequence[int],
    forget: FeatureStatistics | None,
    retain: Mapping[str, FeatureStatistics],
    rule: SelectionRule,
) -> list[SelectedFeature]:
    """The record of each of these features, in this order."""
    kept_score = retain_score(retain, rule)
    rates = {name: s.firing_rate for name, s in retain.items()}
    forget_score = ratio = None
    if forget is not None:
        forget_score = score(forget, rule)
        ratio = importance_ratio(forget_score, kept_score, rule)
        rates = {"forget": forget.firing_rate} | rates
    return [
        SelectedFeature(
            id=j,
            forget_score=None if forget_score is None else float(forget_score[j]),
            retain_score=float(kept_score[j]),
            ratio=None if ratio is None else float(ratio[j]),
            firing_rates={name: float(rate[j]) for name, rate in rates.items()},
        )
        for j in ids
    ]


def percentile(values: Tensor, p: float) -> float:
    """The p-th percentile with linear interpolation, as `numpy.percentile` computes it; any length."""
    ordered = values.double().sort().values
    place = p / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[low], ordered[high], place - low))
