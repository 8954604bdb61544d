"""A guardrail as rows to read. The terminal report and the page show these same rows.

Text that comes from outside (names, passages, answers) passes through `visible`: no control character, escape
sequence or direction override reaches a terminal or a page. Figures that a guardrail lacks are left out, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from saeguard.calibration import Rate
from saeguard.gate import Cusum, Evidence, Gate
from saeguard.guardrail import Guardrail
from saeguard.hookpoints import DESCRIPTIONS
from saeguard.report.formatting import number, percent, visible
from saeguard.rule import Rule
from saeguard.sample import FORGET
from saeguard.selection import SelectedFeature

SCORERS = {
    "density": "density: the share of tokens at which a selected feature is active",
    "evidence": "evidence: weights over the selected features",
    "probe": "probe: a linear probe on the residual stream",
}
ACTIONS = {
    "clamp": "clamp: the selected features are set to -c at hot tokens, and the model goes on",
    "refuse": "refuse: the model answers with a refusal",
    "monitor": "monitor: the trigger is only recorded, nothing is changed",
}
UNMEASURED = "not measured: no forget text"


@dataclass(frozen=True)
class Share:
    """How many of n windows (or questions) did something, with a 95 % Wilson interval."""

    name: str
    hits: int
    n: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any] | None) -> Self:
        """From a rate as the artifact stores it (`Rate.as_dict`); None is a rate of nothing."""
        if entry is None:
            return cls(visible(name), 0, 0, 0.0, 0.0, 1.0)
        low, high = entry["interval"]
        return cls(visible(name), entry["hits"], entry["n"], entry["rate"], low, high)

    @classmethod
    def from_rate(cls, name: str, value: float, n: int) -> Self:
        """From a rate and the number it is of."""
        rate = Rate(round(value * n), n)
        return cls(visible(name), rate.hits, n, value, *rate.interval)

    @property
    def percent(self) -> str:
        """The rate; "-" of nothing."""
        return percent(self.rate) if self.n else "-"

    @property
    def interval(self) -> str:
        """The interval, in percent."""
        return f"{100 * self.low:.0f} to {100 * self.high:.0f} %" if self.n else "-"


@dataclass(frozen=True)
class GateRow:
    """One of the gates that were compared. `false_positives` begin with the corpus nearest to the topic: the one that
    asks for the highest threshold."""

    kind: str
    chosen: bool
    threshold: float
    caught: Share
    false_positives: tuple[Share, ...]
    by_length: tuple[tuple[str, Share, Share], ...]
    auroc: float | None

    @property
    def worst(self) -> Share | None:
        """The retain corpus with the highest false-positive rate; the larger one of equals."""
        return max(self.false_positives, key=lambda share: (share.rate, share.n), default=None)

    @property
    def mean_false(self) -> float:
        """Mean of the corpora's false-positive rates."""
        return sum(share.rate for share in self.false_positives) / max(1, len(self.false_positives))

    @property
    def wrong(self) -> tuple[int, int]:
        """Retain windows that triggered, and retain windows."""
        return sum(share.hits for share in self.false_positives), sum(share.n for share in self.false_positives)


@dataclass(frozen=True)
class Passage:
    """Where a feature is strong: the token in its context."""

    corpus: str
    activation: float
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class FeatureRow:
    """One feature. `weight` is its weight in the evidence gate, where that is the gate."""

    rank: int
    feature: SelectedFeature
    clamped: bool
    weight: float | None
    passages: tuple[Passage, ...]

    @property
    def forget_rate(self) -> str:
        """Firing rate on the topic; "-" without forget text."""
        rate = self.feature.firing_rates.get(FORGET)
        return "-" if rate is None else percent(rate)

    @property
    def explanation(self) -> str:
        """What it was found by; empty where it was not found by an explanation."""
        return visible(self.feature.explanation or "")

    @property
    def worst_retain(self) -> tuple[str, float]:
        """The retain corpus in which it fires most, and the rate there."""
        retain = {name: rate for name, rate in self.feature.firing_rates.items() if name != FORGET}
        name = max(retain, key=retain.__getitem__, default="-")
        return visible(name), retain.get(name, 0.0)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The different tokens of its strongest passages."""
        return tuple(dict.fromkeys(passage.token.strip() or "␣" for passage in self.passages))


def gate_rows(rule: Rule) -> list[GateRow]:
    """The compared gates, the chosen one first."""
    chosen = rule.evidence.get("chosen", rule.gate.kind)
    rows = [_gate_row(kind, kind == chosen, entry) for kind, entry in rule.evidence.get("gates", {}).items()]
    return sorted(rows, key=lambda row: not row.chosen)


def _gate_row(kind: str, chosen: bool, entry: Mapping[str, Any]) -> GateRow:
    asked = {bound["group"]: bound["value"] for bound in entry.get("bounds", ())}
    nearest = sorted(entry["false_positives"], key=lambda name: (-asked.get(name, float("-inf")), name))
    return GateRow(
        kind=kind,
        chosen=chosen,
        threshold=entry["threshold"],
        caught=Share.of(FORGET, entry["caught"]),
        false_positives=tuple(Share.of(name, entry["false_positives"][name]) for name in nearest),
        by_length=tuple(
            (length, Share.of(FORGET, rates["caught"]), Share.of("retain", rates["false_positives"]))
            for length, rates in sorted(entry["by_length"].items(), key=lambda item: int(item[0]))
        ),
        auroc=entry["auroc"],
    )


def feature_rows(rule: Rule) -> list[FeatureRow]:
    """The features in rank order."""
    scorer, clamped = rule.gate.scorer, rule.gate.clamped(len(rule.selected)).tolist()
    weights = scorer.weights.tolist() if isinstance(scorer, Evidence) else [None] * len(rule.selected)
    passages = rule.evidence.get("passages", {})
    return [
        FeatureRow(rank, feature, clamped[rank - 1], weights[rank - 1], _passages(passages.get(str(feature.id), ())))
        for rank, feature in enumerate(rule.selected, 1)
    ]


_PARTS = ("before", "token", "after")


def _passages(entries: Sequence[Mapping[str, Any]]) -> tuple[Passage, ...]:
    return tuple(
        Passage(visible(entry["corpus"]), entry["activation"], *(visible(entry[part]) for part in _PARTS))
        for entry in entries
    )


def model_name(guardrail: Guardrail) -> str:
    """The model's name, or the kind of model where it has none."""
    return visible(str(guardrail.model.get("name") or guardrail.model.get("config", {}).get("model_type", "a model")))


def facts(guardrail: Guardrail, rule: Rule) -> list[tuple[str, str]]:
    """What the guardrail is, as labels and values."""
    config, sae, clamp = guardrail.model.get("config", {}), guardrail.sae, rule.clamp
    clamped = int(rule.gate.clamped(len(rule.features)).sum())
    shape = f"{config.get('num_hidden_layers', '?')} layers, d_model {config.get('hidden_size', '?')}"
    kind = f"{config.get('model_type', '?')}, {shape}"
    encoder = f"{sae.get('activation', '?')}, {number(sae.get('d_sae'))} features; {sae.get('fingerprint', '?')}"
    rows = [
        ("Model", f"{model_name(guardrail)} ({kind}; weights {guardrail.model.get('weights', '?')})"),
        ("Layer", f"{guardrail.layer}, counted from 0: {DESCRIPTIONS[guardrail.hook]}"),
        ("SAE", f"{visible(str(sae.get('source', '?')))} ({encoder})"),
        ("Features", f"{len(rule.features)} selected, {clamped} of them clamped"),
        *_origin(rule),
        ("Gate", describe_gate(rule.gate)),
        ("Threshold", f"{number(rule.threshold)}{describe_method(rule)}"),
        ("Action", ACTIONS[rule.action]),
        ("Clamp", f"{clamp.kind}, c = {number(clamp.c)} ({number(clamp.strength)} times the median residual norm)"
                  f"{', from the first token of a triggered sequence on' if rule.reaches_back else ''}"),
    ]  # fmt: skip
    if rule.encoder.k is not None or rule.evidence.get("topk"):
        rows.append(("TopK", _describe_topk(rule)))
    if doctor := rule.evidence.get("doctor"):
        rows.append(("SAE fits?", describe_doctor(doctor)))
    if windows := rule.evidence.get("windows"):
        rows.append(("Text", ", ".join(f"{number(windows[split])} windows to {use}" for split, use in _USES.items())))
    versions = ", ".join(f"{name} {version}" for name, version in guardrail.versions.items())
    return [*rows, ("Made with", visible(versions) or "-")]


def _origin(rule: Rule) -> list[tuple[str, str]]:
    """How the features were found, where they were given."""
    found = rule.evidence.get("given")
    if not found:
        return []
    if "about" not in found:
        return [("Chosen by", "hand: their ids were given")]
    file = f"{found['file']} (SHA-256 {found['sha256'][:16]})"
    return [("Chosen by", visible(f"their explanations in {file}, about “{found['about']}”, by {found['method']}"))]


_USES = {"fit": "fit on", "calibration": "calibrate on", "test": "test on"}


def describe_doctor(doctor: Mapping[str, Any]) -> str:
    """The verdict, and what speaks against the SAE."""
    against = [finding for finding in doctor["findings"] if finding["level"] != "note"]
    said = "; ".join(f"{finding['what']}: {finding['found']}" for finding in against)
    verdict = doctor["verdict"] + (" (forced)" if doctor["forced"] else "")
    return visible(f"{verdict}: {said}" if said else verdict)


def describe_gate(gate: Gate) -> str:
    """In words: the token score, how it is accumulated, when it decides."""
    how = "averaged over the tokens"
    if isinstance(gate.accumulator, Cusum):
        how = f"accumulated as a CUSUM with drift {number(gate.accumulator.drift)}"
    when = "decided at every token" if gate.moment == "running" else "decided once per forward pass"
    return f"{SCORERS[gate.kind]}; {how}, {when}" + (", kept once triggered" if gate.latch else "")


def chosen_summary(rule: Rule) -> Mapping[str, Any] | None:
    """The stored figures of the gate in use, if there are any."""
    found: Mapping[str, Any] | None = rule.evidence.get("gates", {}).get(rule.evidence.get("chosen", rule.gate.kind))
    return found


def alpha(rule: Rule) -> float | None:
    """The false-positive rate promised per retain corpus, where the threshold is conformal."""
    found: float | None = ((chosen_summary(rule) or {}).get("method") or {}).get("alpha")
    return found


def describe_method(rule: Rule) -> str:
    """How the threshold was found, and which group of windows set it."""
    summary = chosen_summary(rule)
    if summary is None:
        return ""
    highest = max(summary["bounds"], key=lambda bound: bound["value"], default=None)
    by = f", set by {visible(highest['group'])} (n = {highest['n']})" if highest else ""
    if (level := alpha(rule)) is not None:
        return f", split conformal at alpha = {level:g} for every retain corpus and length{by}"
    if summary["method"]["kind"] == "fixed":
        return ", given, not calibrated"
    return f", the {summary['method'].get('p_dyn', 0):g}th percentile of the retain windows"


def _describe_topk(rule: Rule) -> str:
    """Which way TopK is carried, and what the other way would be like."""
    measured = rule.evidence.get("topk") or {}
    agreement = f"agree with exact TopK at {percent(measured['agreement'])}" if "agreement" in measured else ""
    if rule.encoder.k is None:
        return f"fixed thresholds, which {agreement}"
    exact = f"exact: the whole encoder travels with the guardrail (k = {rule.encoder.k})"
    return f"{exact}; fixed thresholds would {agreement}" if agreement else exact
