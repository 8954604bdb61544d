"""Long text: how false alarms are counted, and the promise of few of them."""

from __future__ import annotations

from statistics import mean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_sae
from saeguard import fit
from saeguard.errors import TooFewSequencesError
from saeguard.gate import Cusum, Mean
from saeguard.longrun import Scored, alarms, false_alarms, long_run_bound
from topics import LAYER, SMALL, corpora

DRIFT = 0.4


def text(seed: int, tokens: int) -> Scored:
    """Normal scores, of which every tenth token is not counted."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return Scored(scores, torch.rand(tokens, generator=generator) > 0.1)


def windows(count: int, seed: int = 0) -> list[Scored]:
    return [text(seed * 1000 + place, 20 + place % 30) for place in range(count)]


def slow_alarms(text: Scored, threshold: float) -> int:
    """Token by token: the sum starts anew after each alarm."""
    total, found = 0.0, 0
    for score, counted in zip(text.scores.tolist(), text.counted.tolist(), strict=True):
        total = max(0.0, total + score - DRIFT) if counted else total
        if total > threshold:
            total, found = 0.0, found + 1
    return found


@given(seed=st.integers(0, 999), tokens=st.integers(1, 700), threshold=st.floats(0.5, 6))
def test_alarms_are_those_of_a_loop(seed: int, tokens: int, threshold: float):
    assert alarms(Cusum(DRIFT), text(seed, tokens), threshold) == slow_alarms(text(seed, tokens), threshold)


def test_a_mean_starts_anew_too():
    scores = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    assert alarms(Mean(), Scored(scores, torch.ones(6).bool()), 0.3) == 3


def test_the_bound_keeps_its_promise_on_the_text_it_is_found_on_with_one_alarm_to_spare():
    its, rate = windows(150), 2.0
    bound = long_run_bound(Cusum(DRIFT), its, rate, group="wiki")
    found = false_alarms(Cusum(DRIFT), its, bound)
    assert found.tokens == sum(int(each.counted.sum()) for each in its)
    assert (found.alarms + 1) * 1000 / found.tokens <= rate
    below = false_alarms(Cusum(DRIFT), its, bound - 0.01)
    assert (below.alarms + 1) * 1000 / below.tokens > rate or bound - 0.01 < 0


def test_on_new_text_the_promise_is_kept_on_average():
    rates = []
    for seed in range(1, 13):
        bound = long_run_bound(Cusum(DRIFT), windows(80, seed), 2.0, group="wiki")
        rates.append(false_alarms(Cusum(DRIFT), windows(80, seed + 100), bound).as_dict()["per_1000"])
    assert mean(rates) <= 2.0


def test_too_few_tokens_for_a_promise_say_how_many_are_needed():
    with pytest.raises(TooFewSequencesError, match=r"'wiki'.*0\.1 false alarms.*at least 10,000"):
        long_run_bound(Cusum(DRIFT), windows(20), 0.1, group="wiki")


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_no_amount_of_text_is_enough_for_no_false_alarm_at_all(rate: float):
    with pytest.raises(TooFewSequencesError, match="a rate above 0"):
        long_run_bound(Cusum(DRIFT), windows(20), rate, group="wiki")


def test_long_text_raises_the_threshold_of_fit_where_windows_alone_do_not(llama, tokenizer):
    forget, retain = corpora()
    thresholds = {}
    for per_1000 in (None, 12.0):
        config = SMALL.__class__(**(vars(SMALL) | {"gate": "probe", "drift": 1.0, "per_1000": per_1000}))
        fitted = fit(llama, tokenizer, make_sae("jumprelu"), layer=LAYER, forget=forget, retain=retain, config=config)
        gate = fitted.evidence["gates"]["probe"]
        thresholds[per_1000] = fitted.threshold
        assert gate["method"]["per_1000"] == per_1000
        assert set(gate["false_alarms"]) == set(retain)
        groups = [bound["group"] for bound in gate["bounds"]]
        assert ("kitchen, long text" in groups) == (per_1000 is not None)
    assert thresholds[12.0] >= thresholds[None]
