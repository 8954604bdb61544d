"""The figures that go with a threshold: caught and false-positive rates on held-out text, AUROC, curves.

Everything here is computed on the test split, which neither chose features nor weights nor thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from saeguard.calibration import Bound, Calibration, Conformal, Method, Rate, calibrate, rate_above
from saeguard.gate import Gate
from saeguard.longrun import FalseAlarms, Scored, false_alarms, long_run_bound
from saeguard.sample import FORGET, ScoredWindow, delay, statistics, trajectories

CURVE_POINTS = 60
HISTOGRAM_BINS = 40
QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class GateResult:
    """A calibrated gate and how it does on test text.

    For choosing among gates, on calibration forget text: the share caught, and the detection `delay` (mean share of
    a window that has passed before it triggers, 1 where it never does). Without forget text nothing is known of
    what is caught: rates of 0 windows, null in the artifact.
    """

    gate: Gate
    calibration: Calibration
    caught_in_calibration: Rate
    delay: float | None
    test: Mapping[str, Sequence[float]]
    test_lengths: Sequence[tuple[str, int, float]]
    long_text: Mapping[str, Sequence[Scored]]

    @property
    def threshold(self) -> float:
        """The calibrated threshold."""
        return self.calibration.threshold

    @property
    def forget(self) -> Sequence[float]:
        """Statistics of the forget windows of the test split."""
        return self.test.get(FORGET, ())

    @property
    def retain(self) -> dict[str, Sequence[float]]:
        """Statistics of the retain windows of the test split, by corpus."""
        return {name: values for name, values in self.test.items() if name != FORGET}

    @property
    def caught(self) -> Rate:
        """Share of held-out forget windows that trigger."""
        return rate_above(self.forget, self.threshold)

    @property
    def false_positives(self) -> dict[str, Rate]:
        """Share of held-out windows of each retain corpus that trigger."""
        return {name: rate_above(values, self.threshold) for name, values in self.retain.items()}

    @property
    def false_alarms(self) -> dict[str, FalseAlarms]:
        """False alarms in the retain windows of the test split, those of each corpus read as one text."""
        accumulator, threshold = self.gate.accumulator, self.threshold
        return {name: false_alarms(accumulator, texts, threshold) for name, texts in self.long_text.items()}

    @property
    def auroc(self) -> float | None:
        """Area under the ROC curve, forget against all retain windows of the test split; None where a side is empty."""
        retain = [value for values in self.retain.values() for value in values]
        if not retain or not self.forget:
            return None
        _, ranks = np.unique([*self.forget, *retain], return_inverse=True)  # minus infinity has a rank too
        return float(roc_auc_score([1] * len(self.forget) + [0] * len(retain), ranks))

    @property
    def quantiles(self) -> dict[str, dict[str, float]]:
        """Of the statistics of each corpus, those that are finite: quantile, to four digits, by the share below it."""
        finite = {name: [value for value in its if np.isfinite(value)] for name, its in self.test.items()}
        return {
            name: {str(share): float(f"{np.quantile(its, share):.4g}") for share in QUANTILES}
            for name, its in finite.items()
            if its
        }

    def summary(self) -> dict[str, Any]:
        """The figures for the artifact, with curve and histograms."""
        return {
            "gate": self.gate.kind,
            "threshold": self.threshold,
            "method": {"kind": type(self.calibration.method).__name__.lower()} | asdict(self.calibration.method),
            "bounds": [
                asdict(bound) | {"caught": rate_above(self.forget, bound.value).hits}
                for bound in self.calibration.bounds
            ],
            "caught": _measured(self.caught),
            "caught_in_calibration": _measured(self.caught_in_calibration),
            "delay_in_calibration": self.delay,
            "false_positives": {name: rate.as_dict() for name, rate in self.false_positives.items()},
            "false_alarms": {name: found.as_dict() for name, found in self.false_alarms.items()},
            "by_length": self._by_length(),
            "auroc": self.auroc,
            "curve": self._curve(),
            "histograms": self._histograms(),
            "quantiles": self.quantiles,
        }

    def _by_length(self) -> dict[str, dict[str, Any]]:
        lengths = sorted({length for _, length, _ in self.test_lengths})
        rows: dict[str, dict[str, Any]] = {}
        for length in lengths:
            here = [(name, value) for name, its, value in self.test_lengths if its == length]
            rows[str(length)] = {
                "caught": _measured(rate_above([v for name, v in here if name == FORGET], self.threshold)),
                "false_positives": rate_above([v for name, v in here if name != FORGET], self.threshold).as_dict(),
            }
        return rows

    def _curve(self) -> list[dict[str, float]]:
        """Caught, and the mean and worst false-positive rate, as the threshold moves; empty where a side is."""
        values = self._finite()
        if not (len(values) and self.forget and self.retain):
            return []
        rows = []
        for point in np.unique(np.quantile(values, np.linspace(0, 1, CURVE_POINTS))).tolist():
            false = [rate_above(its, point).value for its in self.retain.values()]
            caught = rate_above(self.forget, point).value
            rows.append(
                {"threshold": point, "caught": caught, "mean_false": float(np.mean(false)), "worst_false": max(false)}
            )
        return rows

    def _histograms(self) -> dict[str, Any]:
        """Windows in each bin of the statistic, by corpus; a window of which nothing was read is in none."""
        values = self._finite()
        low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
        edges = np.linspace(low, high + max(1e-9, 1e-9 * abs(high)), HISTOGRAM_BINS + 1)
        counts = {name: np.histogram(its, edges)[0].tolist() for name, its in self.test.items()}
        return {"edges": edges.tolist(), "counts": counts}

    def _finite(self) -> NDArray[np.float64]:
        """The finite statistics of all test windows."""
        values = np.array([value for its in self.test.values() for value in its], dtype=np.float64)
        return values[np.isfinite(values)]


def evaluate_gate(
    gate: Gate, method: Method, calibration: Sequence[ScoredWindow], test: Sequence[ScoredWindow]
) -> GateResult:
    """Calibrate on the calibration split's retain windows, then test. The scores are those of the gate's scorer."""
    retain = [scored for scored in calibration if scored.window.corpus != FORGET]
    values = statistics(gate, trajectories(gate, retain))
    found = calibrate(
        _group((s.window.corpus, v) for s, v in zip(retain, values, strict=True)),
        method,
        by_length=_group((s.window.length, v) for s, v in zip(retain, values, strict=True)),
        long_run=_long_run(gate, method, _texts(retain)),
    )
    forget = trajectories(gate, [scored for scored in calibration if scored.window.corpus == FORGET])
    tested = statistics(gate, trajectories(gate, test))
    windows = [scored.window for scored in test]
    return GateResult(
        gate=gate,
        calibration=found,
        caught_in_calibration=rate_above(statistics(gate, forget), found.threshold),
        delay=delay(gate, found.threshold, forget) if forget else None,
        test=_group((w.corpus, v) for w, v in zip(windows, tested, strict=True)),
        test_lengths=[(w.corpus, w.length, v) for w, v in zip(windows, tested, strict=True)],
        long_text={name: texts for name, texts in _texts(test).items() if name != FORGET},
    )


def _texts(scored: Sequence[ScoredWindow]) -> dict[str, list[Scored]]:
    """The token scores of each corpus's windows."""
    found: dict[str, list[Scored]] = _group((each.window.corpus, each.text) for each in scored)
    return found


def _long_run(gate: Gate, method: Method, texts: Mapping[str, Sequence[Scored]]) -> list[Bound]:
    """What a promise for long text asks of the threshold, if there is one."""
    if not isinstance(method, Conformal) or method.per_1000 is None:
        return []
    return [
        Bound(f"{name}, long text", len(its), long_run_bound(gate.accumulator, its, method.per_1000, group=name))
        for name, its in texts.items()
    ]


def _measured(rate: Rate) -> dict[str, Any] | None:
    """A rate for the artifact; None of no windows."""
    return rate.as_dict() if rate.n else None


def _group(pairs: Any) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for name, value in pairs:
        groups.setdefault(name, []).append(value)
    return groups
