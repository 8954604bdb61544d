"""`refit`: a guardrail anew for its model after training, with the settings it was fitted with, and how far it moved.

The same steps as `fit`, on text that the changed model reads: no gradient, and no training of anything but the gate's
few weights. With `only="threshold"` features, gate weights and clamp stay, and the threshold is calibrated again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from saeguard.choices import GivenFeatures
from saeguard.config import FitConfig, RefitConfig
from saeguard.doctor.reading import Subject
from saeguard.drift import measure_drift
from saeguard.errors import ArtifactError, SAEMismatchError
from saeguard.fitting import decide
from saeguard.guardrail import Guardrail
from saeguard.material import Texts, gather
from saeguard.rule import Rule


def refit(
    guardrail: Guardrail, subject: Subject, *, forget: Texts | None = None, retain: Mapping[str, Texts],
    config: RefitConfig | None = None, work_dir: str | Path | None = None, show_progress: bool = False,
) -> Guardrail:  # fmt: skip
    """The guardrail for the changed model of `subject`, whose SAE and layer are those it was fitted with.

    Texts and `work_dir` as for `fit`; where the features are not selected anew, forget text may be left out. The
    evidence says under `refit` how far the model moved. Raises a `GuardrailError` by cause.
    """
    config = config or RefitConfig()
    settings = _settings(guardrail)
    settings = replace(settings, force=settings.force or config.force)
    _check(guardrail, subject)
    old, keep = guardrail.rule, config.only == "threshold"
    given = _as_given(old) if keep or old.evidence["given"] is not None else None
    used = replace(settings, given=given, c=old.clamp.c if keep else settings.c)
    with gather(subject, forget, retain, used, work_dir, show_progress=show_progress) as material:
        drift = measure_drift(old, material)
        fitted = decide(material, used, old if keep else None)
    evidence = {
        **fitted.evidence,
        "config": settings.as_dict(),
        "given": old.evidence["given"],
        "refit": {
            "only": config.only,
            "model": dict(guardrail.model),
            "threshold": old.threshold,
            "features_kept": len({*old.features} & {*fitted.features}),
            "drift": {name: its.as_dict() for name, its in drift.items()},
        },
    }
    return replace(fitted, rules=(replace(fitted.rule, evidence=evidence),))


def _settings(guardrail: Guardrail) -> FitConfig:
    """The settings that a guardrail of one rule was fitted with. Raises `ArtifactError`."""
    if len(guardrail.rules) != 1:
        raise ArtifactError.mismatch(
            "rules of the guardrail", found=len(guardrail.rules), expected="1",
            fix="Refit each of the guardrails that were merged, then merge them again.",
        )  # fmt: skip
    recorded = guardrail.evidence.get("config")
    known = FitConfig().as_dict().keys()
    if recorded is None or not recorded.keys() <= known:
        raise ArtifactError.mismatch(
            "settings that the guardrail records", expected="those of `saeguard fit`, under `config` of its evidence",
            found="none" if recorded is None else f"unknown ones, {', '.join(sorted(recorded.keys() - known))}",
            fix="Fit it again with this version of saeguard.",
        )  # fmt: skip
    settings: dict[str, Any] = {name: tuple(its) if isinstance(its, list) else its for name, its in recorded.items()}
    return FitConfig(**settings)


def _check(guardrail: Guardrail, subject: Subject) -> None:
    """Refuse a model of another kind, another tokenizer, layer or SAE."""
    guardrail.check(subject.model, subject.tokenizer, weights=False)
    found, expected = (subject.layer, subject.sae.fingerprint()), (guardrail.layer, guardrail.sae["fingerprint"])
    if found != expected:
        raise SAEMismatchError.mismatch(
            "layer and fingerprint of the SAE", found=found, expected=expected,
            fix=f"Give the SAE the guardrail was fitted with, {guardrail.sae['source']}.",
        )  # fmt: skip


def _as_given(rule: Rule) -> GivenFeatures:
    explanations = {feature.id: feature.explanation for feature in rule.selected if feature.explanation is not None}
    return GivenFeatures(rule.features, explanations)
