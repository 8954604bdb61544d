"""`conditional-refuse`: active features are clamped, and a feature that stands for refusal is raised at the same tokens
("refusal clamp" of Khoriaty et al., arXiv 2503.11127).

    h' = h + sum over active j of (-c - a_j) (W_dec[j] - boost W_dec[r])

The boost is part of the decoder rows, so this is a guardrail like any other. The paper sets r to a fixed value where
any of the features is active; here each that is active adds boost (c + a_j) to it. Unless it is given, r is, of the
features whose ratio of second moments (`REFUSALS` to the worst of all other texts) is among the highest, the one of
highest second moment on `REFUSALS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import reduce

import torch

from saeguard.activations import residual_batches
from saeguard.baselines import settings
from saeguard.baselines.catalogue import Trial
from saeguard.baselines.guarded import config_of
from saeguard.doctor.reading import Subject
from saeguard.errors import SelectionError
from saeguard.fitting import decide
from saeguard.guardrail import Guardrail
from saeguard.material import gather
from saeguard.model import layer_device
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.selection import SelectionRule, importance_ratio, percentile, retain_score, score
from saeguard.statistics import FeatureStatistics
from saeguard.windows import Window, bos_ids, text_ids

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist you with this request.",
    "Sorry, I am not able to answer that question.",
    "I can't provide information on this topic.",
    "Unfortunately, I am unable to help you with that.",
    "I apologize, but I cannot discuss this subject.",
    "I won't answer this, as it is something I must decline.",
    "I'm afraid that I can't do that.",
    "As an AI language model, I cannot fulfil this request.",
    "I have to refuse: this is not something I can talk about.",
)


def run(trial: Trial) -> None:
    """Fit the guardrail and write its folder. Raises a `GuardrailError` by cause."""
    assert trial.sae is not None
    assert trial.layer is not None
    chosen: settings.ConditionalRefuse = trial.settings
    subject = Subject(*trial.load(), trial.sae, trial.layer)
    config = config_of(settings.Conditional(chosen.n, chosen.strength), trial.seed)
    config = replace(config, force=trial.force)
    with gather(subject, trial.forget, trial.retain, config, trial.work, show_progress=True) as material:
        guardrail = decide(material, config)
        feature = chosen.refusal_feature
        if feature is None:
            refusals = statistics_of(subject, REFUSALS)
            feature = refusal_feature(refusals, material.statistics(), guardrail.features, config.selection)
    raising(guardrail, trial.sae, feature, chosen.boost).save_pretrained(trial.out)


def raising(guardrail: Guardrail, sae: SparseAutoencoder, feature: int, boost: float) -> Guardrail:
    """The guardrail with the feature raised where its own are clamped. Raises `SelectionError`."""
    if not 0 <= feature < sae.d_sae or feature in guardrail.features:
        raise SelectionError.mismatch(
            "the refusal feature", found=feature, expected=f"0 to {sae.d_sae - 1}, and none of those that are clamped",
            fix="Name another with --refusal-feature, or leave it out.",
        )  # fmt: skip
    rule = guardrail.rule
    raised = replace(
        rule, decoder=rule.decoder - boost * sae.W_dec[feature],
        evidence={**rule.evidence, "refusal": {"feature": feature, "boost": boost}},
    )  # fmt: skip
    return replace(guardrail, rules=(raised,))


def refusal_feature(
    refusals: FeatureStatistics, others: Mapping[str, FeatureStatistics], clamped: Collection[int], rule: SelectionRule
) -> int:
    """The feature that stands for refusal: none of those that are clamped."""
    scores = score(refusals, rule)
    ratio = importance_ratio(scores, retain_score(others, rule), rule)
    allowed = ratio >= percentile(ratio, rule.p_ratio)
    allowed[list(clamped)] = False
    return int(torch.where(allowed, scores, -1.0).argmax())


def statistics_of(subject: Subject, texts: Collection[str]) -> FeatureStatistics:
    """The statistics of every feature over some texts, each a window."""
    start = bos_ids(subject.tokenizer)
    rows = [(*start, *text_ids(subject.tokenizer, text)) for text in texts]
    windows = [Window(i, "fit", len(row), row, text) for i, (row, text) in enumerate(zip(rows, texts, strict=True))]
    sae = subject.sae.to(layer_device(subject.model, subject.layer))
    read = residual_batches(subject.model, subject.tokenizer, subject.layer, windows, hook=sae.hook)
    parts = [FeatureStatistics.of(sae.encode(batch.hidden[batch.masks.valid].float())) for batch in read]
    return reduce(FeatureStatistics.merge, parts)
