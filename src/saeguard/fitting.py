"""`fit`: from texts to a guardrail. Each step is a function of the records before it.

shards (`material`) -> statistics -> selection -> windows -> quarantine -> gates -> calibration -> guardrail

Given features take the place of selection. They make forget text optional: without it there is no contamination to
look for, and no figure of what is caught.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from saeguard.clamp import Clamp
from saeguard.config import FitConfig
from saeguard.contamination import Contamination, find_contamination
from saeguard.corpus import CorpusSummary
from saeguard.doctor.reading import Subject
from saeguard.errors import TooFewSequencesError
from saeguard.evidence import GateResult, evaluate_gate
from saeguard.gate import Gate
from saeguard.gates import Splits, choose_gate, fit_gates
from saeguard.guardrail import Guardrail
from saeguard.material import Material, Texts, gather
from saeguard.model import model_fingerprint, tokenizer_fingerprint
from saeguard.passages import top_passages
from saeguard.proof import proof_texts
from saeguard.rule import Rule
from saeguard.sae.autoencoder import SparseAutoencoder, TopK
from saeguard.sae.slim import SlimEncoder, slim, topk_agreement, topk_thresholds
from saeguard.sample import FORGET, ReadWindow, read_windows, scored
from saeguard.selection import SelectedFeature, select, take
from saeguard.shards import Pass, Shard
from saeguard.statistics import FeatureStatistics

TOPK_TOKENS = 20_000


def fit(
    model: nn.Module,
    tokenizer: Any,
    sae: SparseAutoencoder,
    *,
    layer: int,
    forget: Texts | None = None,
    retain: Mapping[str, Texts],
    config: FitConfig | None = None,
    work_dir: str | Path | None = None,
    show_progress: bool = False,
) -> Guardrail:
    """Fit a guardrail for one topic.

    `forget` and each of `retain` is a file, an `hf:` address or a list of texts; `forget` may be left out where
    the features are given (`FitConfig.given`). With `work_dir` the shards of the offline pass are kept there, and a
    killed run goes on where it was. Raises a `GuardrailError` by cause.
    """
    config = config or FitConfig()
    subject = Subject(model, tokenizer, sae, layer)
    with gather(subject, forget, retain, config, work_dir, show_progress=show_progress) as material:
        return decide(material, config)


def decide(material: Material, config: FitConfig, kept: Rule | None = None) -> Guardrail:
    """Everything after the offline pass: select, quarantine, fit and compare gates, calibrate, freeze.

    `kept` is a rule whose encoder and gate are taken as they are; its features are those that `config` gives.
    """
    task, summaries, statistics = material.task, material.summaries, material.statistics()
    _check_enough(statistics)
    selected = _select(statistics, config)
    if kept is None:
        encoder, topk = _encoder(task.sae, [feature.id for feature in selected], material.every_shard, config)
    else:
        encoder, topk = kept.encoder, kept.evidence["topk"]
    windows = read_windows(material.every_shard, encoder)
    _check_splits(Splits.of(windows, frozenset()), summaries)
    contamination = _contamination(windows, config)
    outliers = _outliers(contamination, config)
    clean = Splits.of(windows, outliers if config.quarantine else frozenset())
    _check_splits(clean, summaries)
    results = _gates(clean, config, kept)
    chosen, why = choose_gate(results, config) if kept is None else (results[kept.gate.kind], "kept as it was")
    evidence = _evidence(results, why, clean, summaries, contamination)
    evidence |= {"topk": topk, "doctor": material.doctor, "config": config.as_dict()}
    if outliers:
        other = Splits.of(windows, frozenset() if config.quarantine else outliers)
        evidence["threshold_other_way"] = _other_way(chosen, other, config)
    evidence["proof"] = proof_texts(chosen.gate, chosen.threshold, clean.test, task.tokenizer)
    norm = median(window.norm for window in clean.fit)
    return _freeze(task, selected, encoder, chosen, evidence, norm, windows, config)


def _check_enough(statistics: Mapping[str, FeatureStatistics]) -> None:
    for name, its in statistics.items():
        if its.count == 0:
            raise TooFewSequencesError(
                f"the corpus {name!r} has no valid token in its fit split: give it at least ten documents"
            )


def _check_splits(splits: Splits, names: Iterable[str]) -> None:
    """Every corpus has a window in every split: one without calibration windows would set no bound, in silence."""
    for split, windows in vars(splits).items():
        for name in names:
            if all(window.corpus != name for window in windows):
                raise TooFewSequencesError(
                    f"the corpus {name!r} has no window in its {split} split: give it at least ten documents"
                )


def _select(statistics: Mapping[str, FeatureStatistics], config: FitConfig) -> list[SelectedFeature]:
    forget, retain = statistics.get(FORGET), {name: s for name, s in statistics.items() if name != FORGET}
    if config.given is not None:
        return take(config.given, forget, retain, config.selection)
    return select(statistics[FORGET], retain, config.selection)


def _encoder(
    sae: SparseAutoencoder, ids: list[int], shards: Sequence[Shard], config: FitConfig
) -> tuple[SlimEncoder, dict[str, Any] | None]:
    """The slim encoder; for TopK also which way it is carried, and how well fixed thresholds agree with exact TopK."""
    if not isinstance(sae.activation, TopK):
        return slim(sae, ids), None
    tokens = [w.hidden[w.masks.valid[0]].float() for shard in shards for w in shard.windows()]
    hidden = torch.cat(tokens)
    hidden = hidden[torch.randperm(len(hidden), generator=torch.Generator().manual_seed(config.seed))[:TOPK_TOKENS]]
    half = len(hidden) // 2
    thresholds = topk_thresholds(sae, ids, hidden[:half])
    agreement = topk_agreement(sae, ids, thresholds, hidden[half:])
    carried = slim(sae, ids, topk_thresholds=None if config.topk == "exact" else thresholds)
    return carried, {"mode": config.topk, **vars(agreement)}


def _contamination(windows: Sequence[ReadWindow], config: FitConfig) -> Contamination | None:
    """None for the preset `paper`, which looks for none, and where there is no forget text to tell it from."""
    if config.as_authors or all(window.corpus != FORGET for window in windows):
        return None
    return find_contamination([window for window in windows if window.split != "test"])


def _outliers(contamination: Contamination | None, config: FitConfig) -> frozenset[tuple[str, int]]:
    """Documents to leave out; of corpora beside the topic none, since they read like it without being about it."""
    found = contamination.outliers if contamination else frozenset()
    return frozenset(key for key in found if key[0] not in (config.near_retain or ()))


def _gates(splits: Splits, config: FitConfig, kept: Rule | None) -> dict[str, GateResult]:
    """Every gate there can be, by name; the kept one alone where there is one."""
    if kept is not None:
        return {kept.gate.kind: _recalibrated(kept.gate, splits, config)}
    return fit_gates(splits, config, forget=any(window.corpus == FORGET for window in splits.fit))


def _recalibrated(gate: Gate, splits: Splits, config: FitConfig) -> GateResult:
    """A gate with its weights, calibrated and tested on these windows."""
    calibration, test = (scored(gate, windows) for windows in (splits.calibration, splits.test))
    return evaluate_gate(gate, config.method, calibration, test)


def _other_way(chosen: GateResult, splits: Splits, config: FitConfig) -> dict[str, Any]:
    """The threshold and rates with the quarantine the other way round (same gate weights)."""
    result = _recalibrated(chosen.gate, splits, config)
    return {
        "quarantine": not config.quarantine,
        "threshold": result.threshold,
        "caught": result.caught.as_dict(),
        "false_positives": {name: rate.as_dict() for name, rate in result.false_positives.items()},
    }


def _evidence(
    results: Mapping[str, GateResult], why: str, splits: Splits,
    summaries: Mapping[str, CorpusSummary], contamination: Contamination | None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "why_this_gate": why,
        "gates": {name: result.summary() for name, result in results.items()},
        "corpora": {
            name: {
                "documents": s.documents,
                "characters": s.characters,
                "duplicates": s.duplicates,
                "fingerprint": s.fingerprint,
            }
            for name, s in summaries.items()
        },
        "windows": {split: len(windows) for split, windows in vars(splits).items()},
        "contamination": None if contamination is None else contamination.as_dict(),
    }


def _freeze(
    task: Pass, selected: list[SelectedFeature], encoder: SlimEncoder, chosen: GateResult,
    evidence: dict[str, Any], norm: float, windows: Sequence[ReadWindow], config: FitConfig,
) -> Guardrail:  # fmt: skip
    ids = [feature.id for feature in selected]
    c = config.strength * norm if config.c is None else config.c
    evidence |= {
        "chosen": chosen.gate.kind,
        "given": None if config.given is None else dict(config.given.origin),
        "median_residual_norm": norm,
        "passages": top_passages(windows, ids, task.tokenizer),
    }
    rule = Rule(
        name=config.name, selected=tuple(selected), encoder=encoder, decoder=task.sae.W_dec[ids].contiguous(),
        gate=chosen.gate, threshold=chosen.threshold, clamp=Clamp(config.clamp, c, c / norm),
        action=config.action, reach=config.reach, evidence=evidence,
    )  # fmt: skip
    return Guardrail(
        layer=task.layer,
        hook=task.sae.hook,
        hook_out=task.sae.hook_out,
        model=model_fingerprint(task.model),
        tokenizer=tokenizer_fingerprint(task.tokenizer),
        sae={
            "source": task.sae.source,
            "fingerprint": task.sae.fingerprint(),
            "activation": type(task.sae.activation).__name__,
            "d_sae": task.sae.d_sae,
        },
        rules=(rule,),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "saeguard")},
        },
    )
