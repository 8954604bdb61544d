"""Selection: the authors' numbers under preset `paper`, worst-case and pooled retain scores, and its refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import authors_mean, authors_selection
from saeguard.config import PRESETS
from saeguard.errors import SelectionError
from saeguard.selection import SelectionRule, importance_ratio, percentile, retain_score, score, select
from saeguard.statistics import FeatureStatistics

PAPER = PRESETS["paper"].selection
ROWS, TOKENS, D_SAE = 6, 20, 400


def draw(seed: int, *, scale: float = 1.0) -> np.ndarray:
    """Activations (rows, tokens, d_sae) with firing rates and sizes spread over many orders of magnitude."""
    random = np.random.default_rng(seed)
    size = scale * 10.0 ** random.uniform(-6, 1, D_SAE)
    rate = random.uniform(0, 0.6, D_SAE)
    fired = random.random((ROWS, TOKENS, D_SAE)) < rate
    return (fired * random.gamma(1.0, size, (ROWS, TOKENS, D_SAE))).astype(np.float32)


def special_mask() -> np.ndarray:
    mask = np.zeros((ROWS, TOKENS), dtype=bool)
    mask[:, 0] = True
    mask[2, 15:] = True
    return mask


def of(a: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics.of(torch.from_numpy(a[~special_mask()]))


def of_scores(values: list[float]) -> FeatureStatistics:
    """Statistics whose second moment is `values`."""
    squares = torch.tensor(values, dtype=torch.float64)
    return FeatureStatistics(1, squares.sqrt(), squares, (squares > 0).long())


def chosen(forget: FeatureStatistics, retain: dict[str, FeatureStatistics], rule: SelectionRule) -> list[int]:
    return [feature.id for feature in select(forget, retain, rule)]


@pytest.mark.parametrize("seed", range(5))
def test_paper_scores_are_the_authors_numbers_to_the_last_bit(seed):
    a = draw(seed)
    np.testing.assert_array_equal(score(of(a), PAPER).numpy(), authors_mean(a, special_mask()) ** 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("n", "p_ratio"), [(10, 95.0), (20, 90.0), (20, 95.0)])
def test_paper_takes_the_authors_features_in_their_order(seed, n, p_ratio):
    forget, retain = draw(seed), draw(seed + 100)
    rule = SelectionRule(n, p_ratio, PAPER.score, PAPER.retain, PAPER.floor, PAPER.as_authors)
    means = (authors_mean(a, special_mask()) for a in (forget, retain))
    assert chosen(of(forget), {"wiki": of(retain)}, rule) == authors_selection(*means, p_ratio=p_ratio, n=n)


def test_paper_ratio_of_a_feature_rounded_to_zero_is_over_1e21():
    ratio = importance_ratio(torch.tensor([0.04, 0.04]).double(), torch.tensor([0.0, 0.01]).double(), PAPER)
    assert ratio[0] == pytest.approx(0.04 / 1e-21)
    assert ratio[1] == pytest.approx(4.0)


def test_both_scores_against_a_loop():
    a = draw(0)
    valid = a[~special_mask()].astype(np.float64)
    moment, mean = score(of(a), SelectionRule()), score(of(a), SelectionRule(score="squared_mean"))
    for j in range(0, D_SAE, 37):
        assert float(moment[j]) == pytest.approx(sum(x * x for x in valid[:, j]) / len(valid), rel=1e-9)
        assert float(mean[j]) == pytest.approx((sum(valid[:, j]) / len(valid)) ** 2, rel=1e-9)


def test_worst_case_is_the_maximum_and_pooled_counts_tokens():
    one = FeatureStatistics.of(torch.tensor([[2.0, 0.0]]))
    other = FeatureStatistics.of(torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]))
    retain = {"one": one, "other": other}
    assert retain_score(retain, SelectionRule(retain="worst")).tolist() == pytest.approx([4.0, 1.0])
    assert retain_score(retain, SelectionRule(retain="pooled")).tolist() == pytest.approx([1.0, 0.75])


@given(st.integers(0, 50))
def test_with_one_corpus_worst_and_pooled_agree(seed):
    retain = {"wiki": of(draw(seed))}
    worst, pooled = (retain_score(retain, SelectionRule(retain=kind)) for kind in ("worst", "pooled"))
    assert torch.equal(worst, pooled)


def test_a_feature_of_one_retain_corpus_is_left_out_only_by_the_worst_case():
    forget = of_scores([9.0, 8.0, 1.0, 1.0])
    near = FeatureStatistics.of(torch.tensor([[3.0, 0.1, 1.0, 1.0]]))
    far = FeatureStatistics.of(torch.tensor([[0.0, 0.1, 1.0, 1.0]] * 999))
    retain = {"near": near, "far": far}
    assert chosen(forget, retain, SelectionRule(n=1, p_ratio=75.0, retain="worst")) == [1]
    assert chosen(forget, retain, SelectionRule(n=2, p_ratio=50.0, retain="pooled")) == [0, 1]


def test_floor_keeps_ratios_finite_and_relative():
    ratio = importance_ratio(
        torch.tensor([1.0, 1.0, 0.0]).double(), torch.tensor([0.0, 2.0, 0.0]).double(), SelectionRule(floor=1e-4)
    )
    assert ratio.tolist() == pytest.approx([1 / 2e-4, 0.5, 0.0])
    silent = importance_ratio(torch.ones(2).double(), torch.zeros(2).double(), SelectionRule())
    assert bool(silent.isfinite().all())


def test_every_taken_feature_says_why():
    forget, retain = of(draw(1)), {"wiki": of(draw(2)), "chat": of(draw(3))}
    for feature in select(forget, retain, SelectionRule(n=5)):
        assert feature.forget_score == float(forget.second_moment[feature.id])
        assert feature.retain_score == max(float(s.second_moment[feature.id]) for s in retain.values())
        assert feature.ratio >= 0
        assert list(feature.firing_rates) == ["forget", "wiki", "chat"]
        assert feature.firing_rates["chat"] == float(retain["chat"].firing_rate[feature.id])


@pytest.mark.parametrize("rule", [SelectionRule(n=30, p_ratio=95.0), PAPER])
def test_too_few_survivors_is_an_error_that_says_how_many(rule):
    scores = [float(j + 1) for j in range(100)]
    with pytest.raises(SelectionError, match="found 5") as caught:
        select(of_scores(scores), {"wiki": of_scores([1.0] * 100)}, rule)
    assert caught.value.found == 5
    assert "--n 5" in str(caught.value)


def test_features_silent_on_the_topic_are_never_taken():
    with pytest.raises(SelectionError):
        select(of_scores([0.0] * 10), {"wiki": of_scores([0.0] * 10)}, SelectionRule(n=1, p_ratio=0.0))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0, 100))
def test_percentile_is_numpys(values, p):
    assert percentile(torch.tensor(values, dtype=torch.float64), p) == pytest.approx(
        np.percentile(values, p), rel=1e-12, abs=1e-9
    )
