"""`diagnose`: a model, a layer, an SAE and some text to a verdict in words, with its findings and figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from saeguard.compatibility import check_fits
from saeguard.corpus import Corpus
from saeguard.doctor.checks import findings_of
from saeguard.doctor.corrections import corrections
from saeguard.doctor.declared import declared_findings, declared_l0
from saeguard.doctor.figures import Figures
from saeguard.doctor.finding import LEVELS, Finding, Verdict, verdict_of
from saeguard.doctor.measure import features, norms, ordinary_bound, rebuild, reconstruction, total_statistics
from saeguard.doctor.precision import precisions
from saeguard.doctor.reading import Rows, Subject, in_chat, read, sample_windows
from saeguard.errors import SAEMismatchError, TooFewSequencesError
from saeguard.model import decoder_layers, input_device
from saeguard.sae.quality import measure
from saeguard.windows import Window

TOKENS = 4_000
FIT_TOKENS = 2_000
LEAST_TOKENS = 64
PART = 4
"""One window in so many is also read in the chat template, at every layer, and in what only `thorough` does."""


@dataclass(frozen=True)
class Diagnosis:
    """The verdict, the findings from worst to least, and the figures, if the SAE could be run at all."""

    verdict: Verdict
    findings: tuple[Finding, ...]
    figures: Figures | None

    @property
    def mismatch(self) -> Finding | None:
        """The first finding that says the SAE does not fit."""
        return next((finding for finding in self.findings if finding.level == "mismatch"), None)

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return content


def diagnose(subject: Subject, corpora: Sequence[Corpus], *, tokens: int = TOKENS, thorough: bool = True) -> Diagnosis:
    """Examine an SAE on about `tokens` tokens, an equal share of each corpus.

    Not `thorough`: without the loss recovered and without another dtype, which take most of the time and can only
    warn. Raises `LayerError`, `HookError`, `NonFiniteError`, and `CorpusError` by cause.
    """
    try:
        check_fits(subject.model, subject.sae, subject.layer)
    except SAEMismatchError as error:
        return _diagnosis([Finding.of(error)], None)
    subject = replace(subject, sae=subject.sae.to(input_device(subject.model)))
    figures = _figures(subject, sample_windows(subject.tokenizer, corpora, tokens), thorough)
    return _diagnosis([*declared_findings(subject), *findings_of(figures)], figures)


def admit(subject: Subject, corpora: Sequence[Corpus], *, force: bool) -> dict[str, Any]:
    """What a guardrail records of a short examination. Raises `SAEMismatchError` where the SAE does not fit.

    With `force` it raises only where the SAE cannot be run.
    """
    diagnosis = diagnose(subject, corpora, tokens=FIT_TOKENS, thorough=False)
    if (mismatch := diagnosis.mismatch) is not None:
        if diagnosis.figures is None:
            raise mismatch.error()
        if not force:
            raise mismatch.error("`saeguard doctor` shows all figures; --force fits all the same, and records it.")
    return {**diagnosis.as_dict(), "forced": mismatch is not None}


def _diagnosis(findings: Sequence[Finding], figures: Figures | None) -> Diagnosis:
    ordered = sorted(findings, key=lambda finding: LEVELS.index(finding.level))
    return Diagnosis(verdict_of(ordered), tuple(ordered), figures)


def _figures(subject: Subject, windows: dict[str, list[Window]], thorough: bool) -> Figures:
    sae = subject.sae
    readings = {name: read(subject, its) for name, its in windows.items() if its}
    texts = {name: rows for name, reading in readings.items() if len(rows := reading.rows[subject.layer])}
    _check_enough(sum(map(len, texts.values())))
    rebuilt = {name: rebuild(sae, rows) for name, rows in texts.items()}
    rows = Rows.join(texts.values())
    bound = ordinary_bound(rows)
    part = PART if len(rows) >= PART * LEAST_TOKENS else 1
    some = [window for its in windows.values() for window in its[::part]]
    layers = range(len(decoder_layers(subject.model)))
    chat = read(subject, in_chat(subject.tokenizer, some)) if subject.tokenizer.chat_template else None
    return Figures(
        texts={name: reconstruction([part], bound) for name, part in rebuilt.items()},
        whole=reconstruction(list(rebuilt.values()), bound),
        chat=None if chat is None else reconstruction([rebuild(sae, chat.rows[subject.layer])], bound),
        norms=norms(rows, [*readings.values(), *([chat] if chat else [])]),
        features=features(sae, total_statistics(rebuilt)),
        declared_l0=declared_l0(sae),
        corrections=corrections(sae, read(subject, some, layers).rows, subject.layer),
        loss_recovered=_loss_recovered(subject, some) if thorough else None,
        precision=precisions(subject, some, {n: part.statistics for n, part in rebuilt.items()}) if thorough else (),
    )


def _check_enough(tokens: int) -> None:
    if tokens < LEAST_TOKENS:
        raise TooFewSequencesError.mismatch(
            "valid tokens to examine the SAE on", found=tokens, expected=f"at least {LEAST_TOKENS}",
            fix="Give a few thousand tokens of text.",
        )  # fmt: skip


def _loss_recovered(subject: Subject, windows: Sequence[Window]) -> float | None:
    """Only where the SAE's output can take the place of the residual stream."""
    if {subject.sae.hook, subject.sae.hook_out} != {"resid_post"}:
        return None
    return measure(subject.model, subject.tokenizer, subject.sae, subject.layer, windows).loss_recovered
