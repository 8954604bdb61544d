"""Statistics of an evaluation: against slow formulas, and the same figures from the same seed."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saeguard.evaluation.statistics import (
    area_under_curve,
    as_columns,
    bootstrap_estimate,
    difference,
    estimate,
    harmonic_mean,
    mcnemar,
    roc_points,
    same_distribution,
)

SHARES = st.lists(st.booleans(), min_size=1, max_size=60)


@given(SHARES)
def test_a_rate_has_its_wilson_interval(hits):
    found = estimate("rate", as_columns(hits), 0)
    n, p, z = len(hits), sum(hits) / len(hits), 1.959963984540054
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (found.value, found.n) == (p, n)
    assert found.low == pytest.approx(max(0, middle - half), abs=1e-12)
    assert found.high == pytest.approx(min(1, middle + half), abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_counts_those_that_changed(pairs):
    after, before = (as_columns([pair[i] for pair in pairs])[:, 0] for i in (0, 1))
    gained, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    n = gained + lost
    tails = [math.comb(n, k) / 2**n for k in range(n + 1)]
    expected = sum(p for p in tails if p <= tails[gained] * (1 + 1e-9)) if n else 1.0
    assert mcnemar(after, before) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["rate", "mean", "perplexity"])
def test_what_is_the_same_does_not_differ(kind):
    rows = as_columns([[1.0, 2.0], [0.0, 3.0], [1.0, 5.0]] if kind == "perplexity" else [1.0, 0.0, 1.0])
    found = difference(kind, rows, rows, 3)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_the_same_seed_gives_the_same_digits_and_another_seed_others():
    rows = as_columns(np.random.default_rng(0).normal(size=50))
    assert estimate("mean", rows, 1) == estimate("mean", rows, 1)
    assert estimate("mean", rows, 1) != estimate("mean", rows, 2)


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    draw = np.random.default_rng(5)
    found = [estimate("mean", as_columns(draw.normal(size=60)), seed) for seed in range(200)]
    covered = sum(one.low <= 0 <= one.high for one in found)
    assert 0.88 <= covered / 200 <= 0.99


def test_a_clear_difference_is_found_and_noise_is_not():
    draw = np.random.default_rng(1)
    base = draw.normal(size=80)
    assert difference("mean", as_columns(base + 1), as_columns(base), 0).p < 0.01
    assert difference("mean", as_columns(base + 0.01 * draw.normal(size=80)), as_columns(base), 0).p > 0.05


def test_perplexity_weighs_texts_by_their_tokens():
    rows = as_columns([[10.0, 5.0], [3.0, 30.0]])
    assert estimate("perplexity", rows, 0).value == pytest.approx(math.exp(13 / 35))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_auroc_is_the_share_of_pairs_in_order(positive, negative):
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in product(positive, negative)]
    found = area_under_curve(np.array(positive, float), np.array(negative, float), 0)
    assert found.value == pytest.approx(sum(pairs) / len(pairs))
    assert found.low <= found.high


def test_the_roc_curve_has_the_area():
    draw = np.random.default_rng(2)
    positive, negative = draw.normal(1, 1, 40), draw.normal(0, 1, 60)
    xs, ys = np.array(roc_points(positive, negative)).T
    assert np.trapezoid(ys, xs) == pytest.approx(area_under_curve(positive, negative, 0).value)


def test_a_harmonic_mean_is_zero_where_a_part_is():
    assert float(harmonic_mean(np.array([1.0, 0.5]))) == pytest.approx(2 / 3)
    assert float(harmonic_mean(np.array([1.0, 0.0]))) == 0


def test_a_statistic_of_groups_has_an_interval_around_it():
    groups = [as_columns(np.linspace(0, 1, 30)), as_columns(np.linspace(1, 2, 50))]
    found = bootstrap_estimate(groups, lambda its: float(its[0].mean() + its[1].mean()), 0)
    assert found.n == 80
    assert found.low < found.value < found.high


def test_one_distribution_is_told_from_another():
    draw = np.random.default_rng(3)
    assert same_distribution(draw.normal(size=200), draw.normal(size=200)) > 0.01
    assert same_distribution(draw.normal(size=200), draw.normal(1, 1, size=200)) < 1e-6
