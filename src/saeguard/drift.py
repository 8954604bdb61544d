"""How far a model has moved from the one that a guardrail was calibrated on, as far as the guardrail sees it.

For each corpus, then (from the guardrail's evidence) and now (text read by the changed model):

    agreement   sum_j min(r_j, r'_j) / sum_j max(r_j, r'_j) over the selected features, r_j the share of tokens of the
                fit split at which feature j is active: the Jaccard index of the rates. 1: all fire as often as then
    quantiles   of the gate's statistic over the windows of the test split
    triggered   share of these windows above the guardrail's threshold

A guardrail keeps rates, not tokens: features that fire as often, but elsewhere, agree here (the Jaccard index over
tokens is never above this one), and show in the statistic. On other text than then, some drift is the text's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from saeguard.calibration import Fixed
from saeguard.doctor.precision import overlap
from saeguard.evidence import GateResult, evaluate_gate
from saeguard.material import Material
from saeguard.rule import Rule
from saeguard.sample import FORGET, read_windows, scored


@dataclass(frozen=True)
class Drift:
    """The drift on one corpus: `quantiles`, by the share below, and `triggered`, rates for JSON, then and now."""

    same_text: bool
    agreement: float
    quantiles: tuple[Mapping[str, float], Mapping[str, float]]
    triggered: tuple[Mapping[str, Any], Mapping[str, Any]]

    @property
    def shift(self) -> float:
        """The largest distance of a quantile now from what it was, in units of the statistic."""
        then, now = self.quantiles
        return max((abs(now[share] - then[share]) for share in then.keys() & now.keys()), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        pairs = {"quantiles": self.quantiles, "triggered": self.triggered}
        return {
            "same_text": self.same_text,
            "agreement": self.agreement,
            "shift": self.shift,
            **{name: {"then": dict(then), "now": dict(now)} for name, (then, now) in pairs.items()},
        }


def measure_drift(rule: Rule, material: Material) -> dict[str, Drift]:
    """The drift on each corpus that the guardrail knows, `forget` first if it is there."""
    then = rule.evidence["gates"][rule.evidence["chosen"]]
    now = _now(rule, material)
    rates = {name: its.firing_rate[[*rule.features]] for name, its in material.statistics().items()}
    before, after = _triggered(then), _triggered(now.summary())
    return {
        name: Drift(
            same_text=rule.evidence["corpora"][name]["fingerprint"] == material.summaries[name].fingerprint,
            agreement=overlap(torch.tensor([feature.firing_rates[name] for feature in rule.selected]), rates[name]),
            quantiles=(then["quantiles"].get(name, {}), now.quantiles.get(name, {})),
            triggered=(before[name], after[name]),
        )
        for name in material.shards
        if name in before and name in after
    }


def _now(rule: Rule, material: Material) -> GateResult:
    """The old gate at its old threshold, on the test windows of the changed model."""
    windows = [window for window in read_windows(material.every_shard, rule.encoder) if window.split == "test"]
    return evaluate_gate(rule.gate, Fixed(rule.threshold), (), scored(rule.gate, windows))


def _triggered(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Rates by corpus, that of forget text among them where it was measured."""
    topic = {FORGET: figures["caught"]} if figures["caught"] else {}
    return {**topic, **figures["false_positives"]}
