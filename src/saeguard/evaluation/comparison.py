"""`compare`: several methods with equal tuning budgets, each setting chosen on dev items, all reported on test items.

Every method tries the same number of configurations, drawn from its grid (all of it where that is smaller).
What is fitted, answered and measured is kept in the work folder, so a killed comparison goes on where it was. The
chosen setting of each method is fitted once more, alone and from nothing, to see what that takes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from saeguard.baselines.catalogue import Baseline, Cost, Trial, folder_bytes
from saeguard.corpus import Corpus
from saeguard.errors import EvaluationError, GuardrailError
from saeguard.evaluation.choosing import Choice, Setting, Trials
from saeguard.evaluation.harness import Settings, TaskRun, evaluate
from saeguard.evaluation.result import make_result, write_result
from saeguard.evaluation.speed import time_per_token
from saeguard.evaluation.subject import Loader, Subject, checkpoint
from saeguard.evaluation.task import Task
from saeguard.generate import prompt_ids
from saeguard.progress import progress

TIMED_PROMPTS = 8
Measure = Callable[[Baseline, Any], Cost]
"""What it takes to fit a method with some settings from nothing."""


@dataclass(frozen=True)
class Tuned:
    """A method after its settings were tried: the choice among those that could be fitted, and why others could not."""

    baseline: Baseline
    choice: Choice
    failed: Sequence[tuple[Setting, str]]


@dataclass(frozen=True)
class Comparison:
    """What a comparison works on. `trial` is what all methods are fitted on; its settings and folders are not used.

    Without `measure` nothing is timed.
    """

    loader: Loader
    trial: Trial
    methods: Sequence[Baseline]
    budget: int
    tuning: Sequence[Task]
    tasks: Sequence[Task]
    measure: Measure | None
    work: Path

    def run(self, settings: Settings, tolerance: float) -> dict[str, Any]:
        """The result on test items, with the comparison in it. Raises a `GuardrailError` by cause."""
        unguarded = Subject("unguarded", self.loader)
        trials = Trials(unguarded, self.tuning, settings, self.work / "answers", tolerance)
        total = sum(len(drawn(one, self.budget)) for one in self.methods)
        with progress("tuning", 2 * total, unit="settings") as advance:
            tuned = [self._tune(one, trials, advance) for one in self.methods]
        subjects, runs = [unguarded], []
        test = replace(settings, split="test")
        costs: dict[str, Any] = {}
        for one in tuned:
            subject = self._subject(one.baseline, one.choice.setting)
            runs.append(evaluate([unguarded, subject], self.tasks, test, work=self.work / "answers"))
            costs[subject.name] = self._costs(one, subject, unguarded)
            if subject.loader is not self.loader:
                subject.loader.release()
            subjects.append(subject)
        found = make_result(subjects, _together(runs), test, {})
        found["comparison"] = {
            "budget": self.budget,
            "methods": {one.baseline.name: _described(one) | costs[one.baseline.name] for one in tuned},
        }
        return found

    def _tune(self, baseline: Baseline, trials: Trials, advance: Callable[[int], None]) -> Tuned:
        fitted: list[Setting] = []
        failed: list[tuple[Setting, str]] = []
        for setting in drawn(baseline, self.budget):
            try:
                self._folder(baseline, setting)
                fitted.append(setting)
            except GuardrailError as error:
                failed.append((setting, f"{type(error).__name__}: {error}"))
                advance(1)
            advance(1)
        if not fitted:
            raise EvaluationError(f"no configuration of {baseline.name} could be fitted: {failed[0][1]}")
        return Tuned(baseline, trials.choose(fitted, lambda s: self._subject(baseline, s), advance), failed)

    def _subject(self, baseline: Baseline, setting: Setting) -> Subject:
        folder = str(self._folder(baseline, setting))
        if not baseline.trains_weights:
            return Subject.fitted(baseline.name, self.loader, folder)
        model = self.loader.loaded[0]
        device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
        return Subject(baseline.name, checkpoint(folder, self.trial.load, device=device, dtype=dtype))

    def _folder(self, baseline: Baseline, setting: Setting) -> Path:
        """Where a method fitted with a setting lies; it is fitted unless it is there."""
        key = self._key(baseline, setting)
        folder = self.work / "fitted" / f"{baseline.name}-{key}"
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            work = self.work / ("training" if baseline.trains_weights else "shards")
            settings = replace(baseline.settings(), **setting)
            baseline.run(replace(self.trial, settings=settings, out=partial, work=work))
            partial.replace(folder)
        return folder

    def _key(self, baseline: Baseline, setting: Setting) -> str:
        trial = self.trial
        texts = {"forget": trial.forget, **trial.retain}
        parts = [
            baseline.name, asdict(replace(baseline.settings(), **setting)), self.loader.identity, trial.layer,
            None if trial.sae is None else trial.sae.fingerprint(), trial.seed,
            {name: Corpus.of(name, "retain", file).summary().fingerprint for name, file in texts.items()},
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _costs(self, tuned: Tuned, subject: Subject, unguarded: Subject) -> dict[str, Any]:
        """What there is to ship of the chosen setting, and what fitting and running it takes: measured once, kept."""
        baseline, setting = tuned.baseline, tuned.choice.setting
        shipped = {"bytes": folder_bytes(self._folder(baseline, setting))}
        if self.measure is None:
            return shipped
        path = self.work / "costs" / f"{baseline.name}-{self._key(baseline, setting)}.json"
        if not path.is_file():
            cost = self.measure(baseline, replace(baseline.settings(), **setting))
            speed = time_per_token(subject, unguarded, self._prompts())
            write_result({"fit": asdict(cost), "run": asdict(speed)}, path)
        return {**shipped, **json.loads(path.read_text("utf-8"))}

    def _prompts(self) -> list[list[int]]:
        """A few of the judged items of each role, as prompts."""
        items = [item for task in self.tasks for item in task.items()]
        some = [
            item for role in ("topic", "near", "far") for item in [i for i in items if i.role == role][:TIMED_PROMPTS]
        ]
        return [prompt_ids(self.loader.loaded[1], item.content) for item in some]


def drawn(baseline: Baseline, budget: int) -> list[dict[str, Any]]:
    """At most `budget` settings of a method's grid, in its order: always the same ones, drawn by a hash of each."""
    grid = [dict(zip(baseline.grid, values, strict=True)) for values in product(*baseline.grid.values())]
    order = sorted(grid, key=lambda setting: hashlib.sha256(json.dumps(setting).encode()).digest())
    return [setting for setting in grid if setting in order[:budget]]


def _together(runs: Sequence[Sequence[TaskRun]]) -> list[TaskRun]:
    """The runs of several evaluations of the same tasks on the same items as one."""
    return [
        replace(first, records={name: its for run in (first, *others) for name, its in run.records.items()})
        for first, *others in zip(*runs, strict=True)
    ]


def _described(tuned: Tuned) -> dict[str, Any]:
    return {
        "summary": tuned.baseline.summary,
        "trains_weights": tuned.baseline.trains_weights,
        "configurations": len(tuned.choice.points) + len(tuned.failed),
        "failed": [{"setting": setting, "why": why} for setting, why in tuned.failed],
        **tuned.choice.as_dict(),
    }
