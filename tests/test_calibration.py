"""Calibration: conformal bounds and what they promise, the paper's percentile, and rates with intervals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from reference import authors_density, authors_threshold
from saeguard.calibration import Conformal, Percentile, Rate, calibrate, conformal_bound, rate_above
from saeguard.config import PRESETS
from saeguard.errors import TooFewSequencesError

ALPHAS = (0.5, 0.2, 0.1, 0.05, 0.01)


@given(st.sampled_from(ALPHAS), st.integers(0, 120), st.data())
def test_conformal_is_the_kth_smallest(alpha, extra, data):
    n = math.ceil(1 / alpha) - 1 + extra
    values = data.draw(st.lists(st.floats(-100, 100), min_size=n, max_size=n))
    percent = round(alpha * 100)
    k = -(-(n + 1) * (100 - percent) // 100)
    assert conformal_bound(values, alpha, group="wiki") == sorted(values)[k - 1]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_too_few_sequences_says_how_many_are_needed_and_that_many_suffice(alpha):
    needed = round(1 / alpha) - 1
    with pytest.raises(TooFewSequencesError, match="'wiki'") as caught:
        calibrate({"chat": [0.0] * 200, "wiki": [0.0] * (needed - 1)}, Conformal(alpha))
    assert caught.value.found == needed - 1
    assert str(needed) in str(caught.value.expected)
    assert calibrate({"wiki": [1.0] * needed}, Conformal(alpha)).threshold == 1.0


@pytest.mark.parametrize("draw", ["continuous", "ties", "heavy"])
@pytest.mark.parametrize(("alpha", "n"), [(0.05, 19), (0.05, 60), (0.1, 37), (0.2, 200)])
def test_false_positive_rate_over_many_splits_is_at_most_alpha(alpha, n, draw):
    random = np.random.default_rng(n)
    sample = {
        "continuous": lambda size: random.normal(size=size),
        "ties": lambda size: random.integers(0, 8, size) / 8,
        "heavy": lambda size: random.standard_cauchy(size),
    }[draw]
    splits = 4000
    hits = 0
    for _ in range(splits):
        *calibration, new = sample(n + 1).tolist()
        hits += new > conformal_bound(calibration, alpha, group="wiki")
    assert binomtest(hits, splits, alpha, alternative="greater").pvalue > 1e-4


def test_conformal_is_not_needlessly_high():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(4000):
        *calibration, new = random.normal(size=100).tolist()
        hits += new > conformal_bound(calibration, 0.1, group="wiki")
    assert binomtest(hits, 4000, 0.1).pvalue > 1e-4


def test_the_largest_bound_of_all_corpora_and_lengths_is_taken():
    low, high = [i / 100 for i in range(100)], [2 + i / 100 for i in range(100)]
    found = calibrate(
        {"wiki": low, "near": high}, Conformal(0.05), by_length={32: low, 64: [9.0] * 30, 256: [99.0] * 18}
    )
    assert found.threshold == 9.0
    assert {bound.group: bound.n for bound in found.bounds} == {
        "wiki": 100,
        "near": 100,
        "32 tokens": 100,
        "64 tokens": 30,
    }
    assert calibrate({"wiki": low, "near": high}, Conformal(0.05)).threshold == 2.95


def test_a_sequence_of_which_nothing_was_read_calibrates_too():
    assert conformal_bound([-math.inf] * 10 + [0.5] * 10, 0.05, group="wiki") == 0.5


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=80), st.floats(0, 100))
def test_percentile_is_numpys_over_all_corpora(values, p):
    half = len(values) // 2
    corpora = {"wiki": values[:half], "chat": values[half:]}
    assert calibrate(corpora, Percentile(p)).threshold == np.percentile(values, p)


def test_percentile_of_nothing_is_refused():
    with pytest.raises(TooFewSequencesError):
        calibrate({"wiki": []}, Percentile(95.0))


def test_paper_threshold_is_the_authors():
    random = np.random.default_rng(1)
    a = random.normal(size=(40, 30, 16)).clip(min=0) * (random.random((40, 30, 16)) < 0.2)
    density = authors_density(a, [1, 5, 9]).tolist()
    method = PRESETS["paper"].method
    assert method == Percentile(95.0)
    assert calibrate({"wiki": density}, method).threshold == authors_threshold(a, [1, 5, 9])


@given(st.lists(st.integers(0, 5)), st.integers(0, 5))
def test_rates_count_what_is_strictly_above(values, threshold):
    rate = rate_above(values, threshold)
    assert (rate.hits, rate.n) == (sum(value > threshold for value in values), len(values))
    low, high = rate.interval
    assert 0 <= low <= rate.value + 1e-12
    assert rate.value - 1e-12 <= high <= 1
    assert rate.as_dict()["interval"] == [low, high]


def test_wilson_interval_is_the_formula():
    z, n, p = 1.959963984540054, 50, 0.1
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert Rate(5, 50).interval == pytest.approx((centre - half, centre + half))
    assert Rate(0, 0).interval == (0.0, 1.0)
