"""`FeatureStatistics`: any order and grouping gives the sums of the whole corpus."""

from functools import reduce

import torch
from hypothesis import given
from hypothesis import strategies as st

from saeguard.statistics import FeatureStatistics

D_SAE = 6


def activations(seed: int, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, D_SAE, generator=torch.Generator().manual_seed(seed)).relu() * 10


def assert_same(one: FeatureStatistics, other: FeatureStatistics) -> None:
    assert one.count == other.count
    assert torch.equal(one.fired, other.fired)
    torch.testing.assert_close(one.total, other.total, rtol=1e-13, atol=0)
    torch.testing.assert_close(one.squares, other.squares, rtol=1e-13, atol=0)


@given(st.data())
def test_any_order_and_grouping_is_the_whole(data):
    tokens = data.draw(st.integers(0, 40))
    a = activations(data.draw(st.integers(0, 99)), tokens)
    order = data.draw(st.permutations(range(tokens)))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=6)))
    pieces = [FeatureStatistics.of(piece) for piece in a[list(order)].tensor_split(cuts)]
    middle = data.draw(st.integers(0, len(pieces)))
    empty = FeatureStatistics.empty(D_SAE)
    left, right = (reduce(FeatureStatistics.merge, half, empty) for half in (pieces[:middle], pieces[middle:]))
    assert_same(right.merge(left), FeatureStatistics.of(a))


def test_figures_are_those_of_a_loop():
    a = activations(0, 50)
    found = FeatureStatistics.of(a)
    for j in range(D_SAE):
        column = [float(value) for value in a[:, j]]
        assert abs(float(found.mean[j]) - sum(column) / 50) < 1e-9
        assert abs(float(found.second_moment[j]) - sum(value * value for value in column) / 50) < 1e-9
        assert abs(float(found.firing_rate[j]) - sum(value > 0 for value in column) / 50) < 1e-6


def test_an_empty_corpus_has_no_activity():
    empty = FeatureStatistics.of(torch.zeros(0, D_SAE))
    assert_same(empty, FeatureStatistics.empty(D_SAE))
    assert torch.equal(empty.second_moment, torch.zeros(D_SAE, dtype=torch.float64))


def test_sums_keep_small_activations_beside_many_large_ones():
    large, small = torch.full((20_000, 1), 4096.0), torch.full((1, 1), 1e-3)
    merged = FeatureStatistics.of(large).merge(FeatureStatistics.of(small))
    assert float(merged.total - 20_000 * 4096.0) > 0.9e-3


def test_tensors_bring_everything_back():
    found = FeatureStatistics.of(activations(3, 20))
    assert_same(FeatureStatistics.from_tensors(found.tensors()), found)
