"""Methods fitted with settings, each once: kept in a work folder, and why some cannot be.

A failure is kept too where it is the setting's own, which its type tells: of training and its stopping rule
(`BaselineError`, `NonFiniteLossError`), of a selection that finds too few features (`SelectionError`), of a promise
that the text cannot keep (`TooFewSequencesError`). What the machine lacks is tried again: memory (`DoesNotFitError`),
and whatever a missing package or the disk is the cause of. No key depends on where the work folder lies.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from saeguard.baselines.catalogue import Baseline, Trial
from saeguard.corpus import Corpus
from saeguard.errors import BaselineError, DoesNotFitError, GuardrailError, SelectionError, TooFewSequencesError
from saeguard.evaluation.choosing import Setting
from saeguard.evaluation.result import write_result
from saeguard.evaluation.subject import Loader, Subject, checkpoint

ITS_OWN = (BaselineError, SelectionError, TooFewSequencesError)
MACHINE = (OSError, ImportError)


@dataclass(frozen=True)
class Fitted:
    """Fitted methods in `work`. `trial` is what all are fitted on; its settings and folders are not used."""

    loader: Loader
    trial: Trial
    work: Path

    def failure(self, baseline: Baseline, setting: Setting) -> str | None:
        """Why a method cannot be fitted with a setting; None where it can, and then is."""
        kept = self.work / "failed" / f"{self.name(baseline, setting)}.json"
        if kept.is_file():
            return str(json.loads(kept.read_text("utf-8"))["why"])
        try:
            self.folder(baseline, setting)
        except GuardrailError as error:
            why = f"{type(error).__name__}: {error}"
            if is_its_own(error):
                write_result({"why": why}, kept)
            return why
        return None

    def folder(self, baseline: Baseline, setting: Setting) -> Path:
        """Where a method fitted with a setting lies; it is fitted unless it is there. Raises a `GuardrailError`."""
        folder = self.work / "fitted" / self.name(baseline, setting)
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            work = self.work / ("training" if baseline.trains_weights else "shards")
            settings = replace(baseline.settings(), **setting)
            baseline.run(replace(self.trial, settings=settings, out=partial, work=work))
            partial.replace(folder)
        return folder

    def subject(self, baseline: Baseline, setting: Setting) -> Subject:
        """The fitted method as what is judged."""
        folder = self.folder(baseline, setting)
        if not baseline.trains_weights:
            return Subject.fitted(baseline.name, self.loader, str(folder))
        model = self.loader.loaded[0]
        device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
        its = checkpoint(str(folder), self.trial.load, device=device, dtype=dtype, name=folder.name)
        return Subject(baseline.name, its)

    def name(self, baseline: Baseline, setting: Setting) -> str:
        """The method's name and a hash of all that the result depends on."""
        trial = self.trial
        parts = [
            baseline.name, asdict(replace(baseline.settings(), **setting)), self.loader.identity, trial.layer,
            None if trial.sae is None else trial.sae.fingerprint(), trial.seed,
            self._texts,
        ]  # fmt: skip
        return f"{baseline.name}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]}"

    @cached_property
    def _texts(self) -> dict[str, str]:
        """The fingerprints of the texts, which are read for them once."""
        texts = {"forget": self.trial.forget, **self.trial.retain}
        return {name: Corpus.of(name, "retain", file).summary().fingerprint for name, file in texts.items()}


def is_its_own(error: GuardrailError) -> bool:
    """Whether a failure is the setting's, and not the machine's."""
    return (
        isinstance(error, ITS_OWN)
        and not isinstance(error, DoesNotFitError)
        and not isinstance(error.__cause__, MACHINE)
    )
