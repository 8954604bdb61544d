"""`sweep`: fit with every combination of some settings, judge each on dev items, choose one, judge it on test items.

The offline pass of a layer, SAE and share of the texts is run once and serves every other setting; guardrails and
answers that are finished are kept, so a killed sweep goes on where it was. How one is chosen: choosing.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from saeguard.config import FitConfig
from saeguard.corpus import Corpus, read_texts, text_key
from saeguard.evaluation.choosing import Trials
from saeguard.evaluation.harness import Settings, evaluate
from saeguard.evaluation.result import make_result
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.task import Task
from saeguard.fitting import fit
from saeguard.guardrail import Guardrail
from saeguard.progress import progress
from saeguard.sae.autoencoder import SparseAutoencoder

BUCKETS = 1 << 16


@dataclass(frozen=True)
class Place:
    """Where to guard: a layer and an SAE, by the name they have in the sweep."""

    name: str
    layer: int
    sae: SparseAutoencoder


@dataclass(frozen=True)
class Texts:
    """The files to fit on."""

    forget: str
    retain: Mapping[str, str]

    def share(self, fraction: float) -> tuple[str | list[str], dict[str, str | list[str]]]:
        """Forget and retain texts, of which a share is chosen by a hash of each text."""
        return _share(self.forget, fraction), {name: _share(file, fraction) for name, file in self.retain.items()}


@dataclass(frozen=True)
class Sweep:
    """What a sweep works on. `axes` are fields of `FitConfig`, `fraction` and `at`, with the values of each."""

    loader: Loader
    places: Sequence[Place]
    texts: Texts
    base: FitConfig
    axes: Mapping[str, Sequence[Any]]
    tasks: Sequence[Task]
    work: Path

    def run(self, settings: Settings, tolerance: float) -> tuple[Guardrail, dict[str, Any]]:
        """The chosen guardrail, and its result on test items with the sweep in it."""
        unguarded = Subject("unguarded", self.loader)
        grid = [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]
        trials = Trials(unguarded, self.tasks, settings, self.work / "answers", tolerance)
        with progress("sweeping", len(grid), unit="settings") as advance:
            choice = trials.choose(grid, self._subject, advance)
        guardrail = self._guardrail(choice.setting)
        subjects = [unguarded, Subject.guarded("guarded", self.loader, guardrail)]
        test = replace(settings, split="test")
        runs = evaluate(subjects, self.tasks, test, work=self.work / "answers", show_progress=True)
        found = make_result(subjects, runs, test, {})
        found["sweep"] = {"axes": {axis: list(values) for axis, values in self.axes.items()}, **choice.as_dict()}
        return guardrail, found

    def _subject(self, setting: Mapping[str, Any]) -> Subject:
        return Subject.guarded("guarded", self.loader, self._guardrail(setting))

    def _guardrail(self, setting: Mapping[str, Any]) -> Guardrail:
        config = replace(self.base, **{k: v for k, v in setting.items() if k not in ("fraction", "at")})
        place = next((place for place in self.places if place.name == setting.get("at")), self.places[0])
        return kept_fit(self.loader, place, self.texts, config, self.work, fraction=setting.get("fraction", 1.0))


def kept_fit(
    loader: Loader, place: Place, texts: Texts, config: FitConfig, work: Path, *, fraction: float = 1.0
) -> Guardrail:
    """The guardrail of a setting from the work folder, fitted unless it is there."""
    parts = [
        asdict(config), place.layer, place.sae.fingerprint(), loader.identity, fraction,
        Corpus.of("forget", "forget", texts.forget).summary().fingerprint,
        {name: Corpus.of(name, "retain", file).summary().fingerprint for name, file in texts.retain.items()},
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    folder = work / "guardrails" / key
    if folder.exists():
        return Guardrail.from_pretrained(folder)
    forget, retain = texts.share(fraction)
    guardrail = fit(
        *loader.loaded, place.sae, layer=place.layer, forget=forget, retain=retain, config=config,
        work_dir=work / "shards",
    )  # fmt: skip
    guardrail.save_pretrained(folder)
    return guardrail


def _share(file: str, fraction: float) -> str | list[str]:
    if fraction >= 1:
        return file
    return [text for text in read_texts(file) if text_key(text) % BUCKETS < fraction * BUCKETS]
