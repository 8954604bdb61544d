"""The gates that `fit` compares, each calibrated and tested, and which of them it takes.

With forget text: density, and the learned gates evidence and probe, each with the drift that triggers soonest on
calibration forget text. Without it nothing can be learned of the topic: density, and evidence whose weights say how
rare each feature is in ordinary text, each with a drift that ordinary text sets (docs/zero-shot.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from saeguard.calibration import calibrate
from saeguard.config import FitConfig
from saeguard.detectors import fit_evidence, fit_probe
from saeguard.errors import CorpusError, TooFewSequencesError
from saeguard.evidence import GateResult, evaluate_gate
from saeguard.gate import Accumulator, Cusum, Density, Evidence, Gate, Mean, Scorer
from saeguard.sample import FORGET, ReadWindow, labelled_activity, labelled_hidden, mean_score, scored

MIN_FORGET_WINDOWS = 10
DRIFTS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


@dataclass(frozen=True)
class Splits:
    """The sampled windows by split, without the quarantined documents in fit and calibration."""

    fit: list[ReadWindow]
    calibration: list[ReadWindow]
    test: list[ReadWindow]

    @classmethod
    def of(cls, windows: Sequence[ReadWindow], outliers: frozenset[tuple[str, int]]) -> Splits:
        """Split; `outliers` are the keys of documents that only the test split keeps."""
        kept = [window for window in windows if window.split == "test" or window.key not in outliers]
        return cls(*([w for w in kept if w.split == split] for split in ("fit", "calibration", "test")))


def fit_gates(splits: Splits, config: FitConfig, *, forget: bool) -> dict[str, GateResult]:
    """Every gate there can be, by name; `forget`: whether there is forget text. Raises a `CorpusError`."""
    if not forget:
        return _without_forget_text(splits, config)
    topic = sum(window.corpus == FORGET for window in splits.fit)
    if topic < MIN_FORGET_WINDOWS:
        raise TooFewSequencesError.mismatch(
            "windows of forget text to fit on",
            found=topic,
            expected=f"at least {MIN_FORGET_WINDOWS}",
            fix="Give more text.",
        )
    scorers: dict[str, Scorer] = {"density": Density()}
    if config.gate != "density":
        fit = sorted(splits.fit, key=lambda window: window.key)  # the order of the corpora shall not change a bit
        near = config.near_retain or ()
        scorers["evidence"] = fit_evidence(labelled_activity(fit, near))
        scorers["probe"] = fit_probe(labelled_hidden(fit, near))
    return {name: calibrated(scorer, splits, config) for name, scorer in scorers.items()}


def calibrated(scorer: Scorer, splits: Splits, config: FitConfig) -> GateResult:
    """The gate that accumulates a scorer's scores, calibrated and tested; there is forget text."""
    topic = [window for window in splits.fit if window.corpus == FORGET]
    return _best(_gates(scorer, topic, config), splits, config)


def choose_gate(results: Mapping[str, GateResult], config: FitConfig) -> tuple[GateResult, str]:
    """Evidence, unless another gate's caught rate is above evidence's interval; on calibration text, not on test."""
    if config.gate != "auto":
        return results[config.gate], "asked for"
    evidence = results["evidence"]
    if not evidence.caught_in_calibration.n:
        return evidence, "without forget text the rarer features count for more; a probe cannot be learned"
    low, high = evidence.caught_in_calibration.interval
    best = max(results.values(), key=lambda result: result.caught_in_calibration.value)
    if best.caught_in_calibration.value > high:
        return best, (
            f"catches {best.caught_in_calibration.value:.2f} of calibration forget text, above the interval "
            f"{low:.2f} to {high:.2f} of evidence"
        )
    return evidence, "explainable, and no other gate catches more beyond its interval on calibration forget text"


def _without_forget_text(splits: Splits, config: FitConfig) -> dict[str, GateResult]:
    if config.gate == "probe":
        raise CorpusError("the gate probe is learned from forget text: give some, or ask for evidence or density")
    if config.drift is not None:
        raise CorpusError("the drift is in units of the topic's mean score, which only forget text tells: leave it out")
    scorers: dict[str, Scorer] = {"density": Density()}
    if config.gate != "density":
        scorers["evidence"] = rarity(splits.fit)
    gates = {name: _gate(scorer, _accumulator(scorer, splits.fit, config), config) for name, scorer in scorers.items()}
    return {name: _best([gate], splits, config) for name, gate in gates.items()}


def rarity(retain: Sequence[ReadWindow]) -> Evidence:
    """Weights -log(r_j), with r_j the share of tokens at which feature j is active, in the retain corpus of the most.

    If all features were equally likely on the topic, that is a token's log-likelihood ratio but for a constant. One
    active token more than there is keeps r_j above 0, one silent token below 1.
    """
    rates = [
        (active.sum(dim=0) + 1) / (len(active) + 2)
        for active in (
            torch.cat([(w.activations > 0)[w.masks.valid[0]].double() for w in windows])
            for windows in _by_corpus(retain).values()
        )
    ]
    return Evidence(-torch.stack(rates).amax(dim=0).log().float(), 0.0)


def _accumulator(scorer: Scorer, retain: Sequence[ReadWindow], config: FitConfig) -> Accumulator:
    """Cusum with the threshold that the mean would have as its drift: what ordinary windows show adds up to nothing."""
    if config.accumulate == "mean":
        return Mean()
    means = {name: [mean_score(scorer, [w]) for w in windows] for name, windows in _by_corpus(retain).items()}
    return Cusum(calibrate(means, config.method).threshold)


def _by_corpus(windows: Sequence[ReadWindow]) -> dict[str, list[ReadWindow]]:
    return {name: [w for w in windows if w.corpus == name] for name in dict.fromkeys(w.corpus for w in windows)}


def _gates(scorer: Scorer, topic: Sequence[ReadWindow], config: FitConfig) -> list[Gate]:
    """The gates that accumulate this scorer's scores: one, or one for each drift to choose from."""
    accumulators: list[Accumulator] = [Mean()]
    if config.accumulate == "cusum":
        unit = mean_score(scorer, topic)
        accumulators = [Cusum(drift * unit) for drift in (DRIFTS if config.drift is None else (config.drift,))]
    return [_gate(scorer, accumulator, config) for accumulator in accumulators]


def _gate(scorer: Scorer, accumulator: Accumulator, config: FitConfig) -> Gate:
    counts: Literal["valid", "attended"] = "attended" if config.as_authors else "valid"
    return Gate(scorer, accumulator, config.moment, counts, config.latch)


def soonest(results: Iterable[GateResult]) -> GateResult:
    """The gate that triggers soonest on calibration forget text, the first of equals."""
    return min(results, key=lambda result: 1.0 if result.delay is None else result.delay)


def _best(gates: Sequence[Gate], splits: Splits, config: FitConfig) -> GateResult:
    """The soonest of these gates, each calibrated; of one scorer all."""
    calibration, test = (scored(gates[0], windows) for windows in (splits.calibration, splits.test))
    method = config.method if len(gates) == 1 else config.comparing
    best = soonest(evaluate_gate(gate, method, calibration, test) for gate in gates)
    return best if method == config.method else evaluate_gate(best.gate, config.method, calibration, test)
