"""`sweep`: fit with every combination of some settings, judge each on dev items, choose one, judge it on test items.

The offline pass of a layer, SAE and share of the texts is run once and serves every other setting; guardrails and
answers that are finished are kept, so a killed sweep goes on where it was.

The rule: of the settings that keep accuracy off the topic (near and far together) within a tolerance of the unguarded
model's, the one with the lowest accuracy on the topic; if none does, the one that keeps most.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from saeguard.choices import Role
from saeguard.config import FitConfig
from saeguard.corpus import Corpus, read_texts, text_key
from saeguard.errors import EvaluationError
from saeguard.evaluation.harness import Settings, TaskRun, evaluate
from saeguard.evaluation.result import make_result
from saeguard.evaluation.statistics import Estimate, as_columns, estimate
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.task import ROLES, Dev, Record, Task
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
class Point:
    """A setting and how it did on dev items: by role, and near and far together."""

    setting: Mapping[str, Any]
    accuracy: Mapping[Role, Estimate]
    triggered: Mapping[Role, Estimate]
    kept: Estimate

    @classmethod
    def of(cls, setting: Mapping[str, Any], runs: Sequence[TaskRun], subject: str, seed: int) -> Point:
        """From runs on dev items; raises `EvaluationError` for any other."""
        if not all(isinstance(run.side, Dev) for run in runs):
            raise EvaluationError("settings are chosen on dev items only")
        records = [record for run in runs for record in run.records[subject]]
        by_role = {role: [r for r in records if r.role == role] for role in ROLES}
        found = {role: its for role, its in by_role.items() if its}
        return cls(
            setting=setting,
            accuracy={role: _accuracy(its, seed) for role, its in found.items()},
            triggered={role: estimate("rate", as_columns([bool(r.triggered) for r in its]), seed)
                       for role, its in found.items()},
            kept=_accuracy([r for r in records if r.role != "topic"], seed),
        )  # fmt: skip


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
        dev = replace(settings, split="dev")
        points = []
        grid = [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]
        with progress("sweeping", len(grid), unit="settings") as advance:
            for setting in grid:
                runs = evaluate([unguarded, self._subject(setting)], self.tasks, dev, work=self.work / "answers")
                points.append(Point.of(setting, runs, "guarded", settings.seed))
                advance(1)
        before = Point.of({}, runs, "unguarded", settings.seed).kept
        chosen = choose(points, before.value - tolerance)
        subjects = [unguarded, self._subject(points[chosen].setting)]
        test = replace(settings, split="test")
        runs = evaluate(subjects, self.tasks, test, work=self.work / "answers", show_progress=True)
        found = make_result(subjects, runs, test, {})
        found["sweep"] = {
            "axes": {axis: list(values) for axis, values in self.axes.items()},
            "points": [asdict(point) for point in points],
            "chosen": chosen,
            "unguarded": asdict(before),
            "rule": f"Chosen on dev items: of the settings that keep accuracy off the topic, up to {tolerance:.1%}, "
            "at the unguarded model's, the one with the lowest accuracy on the topic.",
            "note": _note(points[chosen], before.value - tolerance),
        }
        guardrail = subjects[1].guardrail
        assert guardrail is not None
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


def choose(points: Sequence[Point], least: float) -> int:
    """The index of the point to take, by the rule; `least` is the accuracy that must be kept off the topic."""
    keeping = [i for i, point in enumerate(points) if point.kept.value >= least]
    if not keeping:
        return max(range(len(points)), key=lambda i: points[i].kept.value)
    return min(keeping, key=lambda i: (points[i].accuracy["topic"].value, -points[i].kept.value))


def _note(point: Point, least: float) -> str:
    return "" if point.kept.value >= least else "None keeps that much: this is the one that keeps most."


def _accuracy(records: Sequence[Record], seed: int) -> Estimate:
    return estimate("rate", as_columns([record.scores["accuracy"] for record in records]), seed)


def _share(file: str, fraction: float) -> str | list[str]:
    if fraction >= 1:
        return file
    return [text for text in read_texts(file) if text_key(text) % BUCKETS < fraction * BUCKETS]
