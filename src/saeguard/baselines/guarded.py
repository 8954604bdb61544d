"""The methods that are a guardrail: each is one way to fit it, and all run through the same gate and the same clamp.

    dsg            the preset `paper`, with the clamp in units of the residual norm
    evidence       the default preset with its explainable gate
    probe          logistic regression on the residual stream as the gate; features are clamped
    probe-refuse   the same gate; the answer is a refusal
    static         a gate that always holds; features by retain threshold, all or the active ones clamped where one is
                   active (Farrell et al., arXiv 2410.19278)
    conditional    a gate that always holds; features by importance ratio, each clamped at the tokens where it is active
                   ("clamp prime" of Khoriaty et al., arXiv 2503.11127; its threshold of 1e-4 on activations is 0 here)

Farrell et al. and Khoriaty et al. work on one retain set; here the worst of the named corpora counts, as elsewhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from saeguard.baselines import settings
from saeguard.baselines.catalogue import Trial
from saeguard.config import PRESETS, FitConfig
from saeguard.fitting import fit

ALWAYS = -1.0
"""A threshold that every density passes."""
DEFAULT = PRESETS["default"]
ALWAYS_ON = replace(DEFAULT, gate="density", accumulate="mean", threshold=ALWAYS)
STARTS: dict[type, FitConfig] = {
    settings.DSG: replace(PRESETS["paper"], c=None),
    settings.Evidence: replace(DEFAULT, gate="evidence"),
    settings.ProbeClamp: replace(DEFAULT, gate="probe"),
    settings.ProbeRefuse: replace(DEFAULT, gate="probe", action="refuse"),
    settings.Static: ALWAYS_ON,
    settings.Conditional: replace(ALWAYS_ON, clamp="active"),
}


def run(trial: Trial) -> None:
    """Fit the guardrail and write its folder. Raises a `GuardrailError` by cause."""
    model, tokenizer = trial.load()
    assert trial.sae is not None
    assert trial.layer is not None
    config = replace(config_of(trial.settings, trial.seed), force=trial.force)
    fit(
        model, tokenizer, trial.sae, layer=trial.layer, forget=trial.forget, retain=trial.retain, config=config,
        work_dir=trial.work, show_progress=True,
    ).save_pretrained(trial.out)  # fmt: skip


def config_of(chosen: Any, seed: int) -> FitConfig:
    """How `fit` is to run for a method's settings."""
    return replace(STARTS[type(chosen)], **vars(chosen), seed=seed)
