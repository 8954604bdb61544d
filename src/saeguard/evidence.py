"""The figures that go with a threshold: caught and false-positive rates on held-out text, AUROC, curves.

Everything here is computed on the test split, which neither chose features nor weights nor thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from saeguard.calibration import Calibration, Rate, calibrate, rate_above
from saeguard.calibration import Method
from saeguard.gate import Gate
from saeguard.sample import FORGET, ReadWindow, statistics

CURVE_POINTS = 60
HISTOGRAM_BINS = 40


@dataclass(frozen=True)
class GateResult:
    """A calibrated gate and how it does: `caught` on calibration forget text (for choosing), the rest on test text."""

    gate: Gate
    calibration: Calibration
    caught_in_calibration: Rate
    test: Mapping[str, Sequence[float]]
    test_lengths: Sequence[tuple[str, int, float]]

    @property
    def threshold(self) -> float:
        """The calibrated threshold."""
        return self.calibration.threshold

    @property
    def caught(self) -> Rate:
        """Share of held-out forget windows that trigger."""
        return rate_above(self.test[FORGET], self.threshold)

    @property
    def false_positives(self) -> dict[str, Rate]:
        """Share of held-out windows of each retain corpus that trigger."""
        return {name: rate_above(values, self.threshold) for name, values in self.test.items() if name != FORGET}

    @property
    def auroc(self) -> float:
        """Area under the ROC curve, forget against all retain windows of the test split."""
        retain = [value for name, values in self.test.items() if name != FORGET for value in values]
        forget = list(self.test[FORGET])
        if not retain or not forget:
            return float("nan")
        return float(roc_auc_score([1] * len(forget) + [0] * len(retain), forget + retain))

    def summary(self) -> dict[str, Any]:
        """The figures for the artifact, with curve and histograms."""
        return {
            "gate": self.gate.kind,
            "threshold": self.threshold,
            "method": {"kind": type(self.calibration.method).__name__.lower()} | asdict(self.calibration.method),
            "bounds": [asdict(bound) for bound in self.calibration.bounds],
            "caught": self.caught.as_dict(),
            "caught_in_calibration": self.caught_in_calibration.as_dict(),
            "false_positives": {name: rate.as_dict() for name, rate in self.false_positives.items()},
            "by_length": self._by_length(),
            "auroc": self.auroc,
            "curve": self._curve(),
            "histograms": self._histograms(),
        }

    def _by_length(self) -> dict[str, dict[str, Any]]:
        lengths = sorted({length for _, length, _ in self.test_lengths})
        rows: dict[str, dict[str, Any]] = {}
        for length in lengths:
            here = [(name, value) for name, its, value in self.test_lengths if its == length]
            rows[str(length)] = {
                "caught": rate_above([v for name, v in here if name == FORGET], self.threshold).as_dict(),
                "false_positives": rate_above([v for name, v in here if name != FORGET], self.threshold).as_dict(),
            }
        return rows

    def _curve(self) -> list[dict[str, float]]:
        """Caught, and the mean and worst false-positive rate, as the threshold moves."""
        pooled = np.concatenate([np.asarray(values) for values in self.test.values()])
        points = np.unique(np.quantile(pooled, np.linspace(0, 1, CURVE_POINTS)))
        rows = []
        for point in points.tolist():
            false = [rate_above(values, point).value for name, values in self.test.items() if name != FORGET]
            caught = rate_above(self.test[FORGET], point).value
            rows.append({"threshold": point, "caught": caught, "mean_false": float(np.mean(false)), "worst_false": max(false)})
        return rows

    def _histograms(self) -> dict[str, Any]:
        pooled = np.concatenate([np.asarray(values) for values in self.test.values()])
        edges = np.linspace(pooled.min(), pooled.max() + 1e-9, HISTOGRAM_BINS + 1)
        counts = {name: np.histogram(values, edges)[0].tolist() for name, values in self.test.items()}
        return {"edges": edges.tolist(), "counts": counts}


def evaluate_gate(
    gate: Gate, method: Method, calibration: Sequence[ReadWindow], test: Sequence[ReadWindow]
) -> GateResult:
    """Calibrate on the calibration split's retain windows, then test."""
    names = [window.corpus for window in calibration]
    values = statistics(gate, calibration)
    retain = _group((n, v) for n, v in zip(names, values, strict=True) if n != FORGET)
    lengths = _group((w.length, v) for w, v in zip(calibration, values, strict=True) if w.corpus != FORGET)
    found = calibrate(retain, method, by_length=lengths)
    tested = statistics(gate, test)
    return GateResult(
        gate=gate,
        calibration=found,
        caught_in_calibration=rate_above([v for n, v in zip(names, values, strict=True) if n == FORGET], found.threshold),
        test=_group((w.corpus, v) for w, v in zip(test, tested, strict=True)),
        test_lengths=[(w.corpus, w.length, v) for w, v in zip(test, tested, strict=True)],
    )


def _group(pairs: Any) -> dict[Any, list[float]]:
    groups: dict[Any, list[float]] = {}
    for name, value in pairs:
        groups.setdefault(name, []).append(value)
    return groups
