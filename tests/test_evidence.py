"""How gates are compared on the calibration split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import make_sae
from saeguard import fit
from saeguard.gate import Cusum, Density, Gate
from saeguard.gates import DRIFTS
from saeguard.sample import delay, statistics
from topics import LAYER, SMALL, corpora

THRESHOLD = 2.0
LATE = torch.tensor([0.0, 1.0, 2.0, 3.0])
EARLY = torch.tensor([0.0, 3.0, 0.0, 0.0])
NEVER = torch.tensor([2.0, 2.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("trajectory", "expected"), [(LATE, 0.75), (EARLY, 0.25), (NEVER, 1.0)], ids=["late", "early", "never"]
)
def test_delay_is_the_share_read_before_the_gate_triggers(trajectory: Tensor, expected: float):
    assert delay(Gate(Density()), THRESHOLD, [trajectory]) == expected


def test_delay_is_the_mean_over_windows():
    assert delay(Gate(Density()), THRESHOLD, [LATE, EARLY, NEVER]) == pytest.approx(2 / 3)


def test_a_gate_that_decides_for_the_whole_block_waits_for_nothing_or_never_triggers():
    gate = Gate(Density(), Cusum(0.5), moment="block")
    assert [delay(gate, THRESHOLD, [each]) for each in (LATE, EARLY, NEVER)] == [0.0, 0.0, 1.0]


def test_the_statistic_of_a_window_is_the_highest_on_its_way():
    assert statistics(Gate(Density()), [LATE, EARLY, NEVER]) == [3.0, 3.0, 2.0]


def test_fit_keeps_the_drift_that_triggers_soonest_on_calibration_forget_text(llama, tokenizer):
    forget, retain = corpora()
    sae = make_sae("jumprelu")

    def delay_with(drift: float | None) -> float:
        config = replace(SMALL, gate="probe", drift=drift)
        fitted = fit(llama, tokenizer, sae, layer=LAYER, forget=forget, retain=retain, config=config)
        return fitted.evidence["gates"]["probe"]["delay_in_calibration"]

    each = [delay_with(drift) for drift in DRIFTS]
    assert delay_with(None) == min(each) < max(each)
