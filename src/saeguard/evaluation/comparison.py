"""`compare`: several methods with equal tuning budgets, each setting chosen on dev items, all reported on test items.

Every method tries the same number of configurations, drawn from its grid (all of it where that is smaller).
What is fitted (or could not be), answered and measured is kept in the work folder, so a killed comparison goes on where
it was, and folders of several can be copied together. The chosen setting of each method is fitted once more, alone and
from nothing, to see what that takes; and its model may be trained further on the topic, to see what comes back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from saeguard.baselines.catalogue import Baseline, Cost, Trial, folder_bytes
from saeguard.errors import EvaluationError
from saeguard.evaluation.choosing import Choice, Setting, Trials
from saeguard.evaluation.fitted import Fitted
from saeguard.evaluation.harness import Settings, TaskRun, evaluate
from saeguard.evaluation.result import make_result, write_result
from saeguard.evaluation.speed import time_per_token
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.survival import Relearn, Survival
from saeguard.evaluation.task import Task
from saeguard.generate import prompt_ids
from saeguard.progress import progress

TIMED_PROMPTS = 8
Measure = Callable[[Baseline, Any], Cost]
"""What it takes to fit a method with some settings from nothing."""


@dataclass(frozen=True)
class Tried:
    """A method after its settings were tried: those that could not be fitted, and why."""

    baseline: Baseline
    failed: Sequence[tuple[Setting, str]]

    def failures(self) -> list[dict[str, Any]]:
        """For the result."""
        return [{"setting": setting, "why": why} for setting, why in self.failed]


@dataclass(frozen=True)
class Tuned(Tried):
    """With the choice among those that could."""

    choice: Choice


@dataclass(frozen=True)
class Comparison:
    """What a comparison works on. `trial` is what all methods are fitted on; its settings and folders are not used.

    Without `measure` nothing is timed, without `relearn` no model is trained further.
    """

    loader: Loader
    trial: Trial
    methods: Sequence[Baseline]
    budget: int
    tuning: Sequence[Task]
    tasks: Sequence[Task]
    measure: Measure | None
    work: Path
    relearn: Relearn | None = None

    def run(self, settings: Settings, tolerance: float) -> dict[str, Any]:
        """The result on test items, with the comparison in it. Raises a `GuardrailError` by cause."""
        unguarded = Subject("unguarded", self.loader)
        survival = self.relearn and Survival.of(self.relearn, self.tuning, settings, self.work)
        trials = Trials(unguarded, self.tuning, settings, self.work / "answers", tolerance)
        total = sum(len(drawn(one, self.budget)) for one in self.methods)
        with progress("tuning", 2 * total, unit="settings") as advance:
            tried = [self._tune(one, trials, advance) for one in self.methods]
        tuned = [one for one in tried if isinstance(one, Tuned)]
        if not tuned:
            why = tried[0].failed[0][1]
            raise EvaluationError(f"no configuration of {tried[0].baseline.name} could be fitted: {why}")
        subjects, runs = [unguarded], []
        test = replace(settings, split="test")
        found: dict[str, Any] = {}
        for one in tuned:
            subject = self._fitted.subject(one.baseline, one.choice.setting)
            runs.append(evaluate([unguarded, subject], self.tasks, test, work=self.work / "answers"))
            its = self._costs(one, subject, unguarded) | self._relearned(one, subject, survival)
            found[subject.name] = _described(one) | its
            if subject.loader is not self.loader:
                subject.loader.release()
            subjects.append(subject)
        result = make_result(subjects, _together(runs), test, {})
        unfitted = {one.baseline.name: one.failures() for one in tried if not isinstance(one, Tuned)}
        result["comparison"] = {"budget": self.budget, "methods": found, "unfitted": unfitted}
        if survival:
            control = survival.figures(unguarded, self.loader.identity)
            result["comparison"]["relearning"] = {**survival.relearning.about, "control": control}
            survival.relearning.discard(unguarded)
        return result

    @cached_property
    def _fitted(self) -> Fitted:
        return Fitted(self.loader, self.trial, self.work)

    def _tune(self, baseline: Baseline, trials: Trials, advance: Callable[[int], None]) -> Tried:
        fitted: list[Setting] = []
        failed: list[tuple[Setting, str]] = []
        for setting in drawn(baseline, self.budget):
            why = self._fitted.failure(baseline, setting)
            if why is None:
                fitted.append(setting)
            else:
                failed.append((setting, why))
            advance(1 if why is None else 2)
        if not fitted:
            return Tried(baseline, failed)
        return Tuned(baseline, failed, trials.choose(fitted, lambda s: self._fitted.subject(baseline, s), advance))

    def _costs(self, tuned: Tuned, subject: Subject, unguarded: Subject) -> dict[str, Any]:
        """What there is to ship of the chosen setting, and what fitting and running it takes: measured once, kept."""
        baseline, setting = tuned.baseline, tuned.choice.setting
        shipped = {"bytes": folder_bytes(self._fitted.folder(baseline, setting))}
        if self.measure is None:
            return shipped
        path = self.work / "costs" / f"{self._fitted.name(baseline, setting)}.json"
        if not path.is_file():
            cost = self.measure(baseline, replace(baseline.settings(), **setting))
            speed = time_per_token(subject, unguarded, self._prompts())
            write_result({"fit": asdict(cost), "run": asdict(speed)}, path)
        return {**shipped, **json.loads(path.read_text("utf-8"))}

    def _relearned(self, tuned: Tuned, subject: Subject, survival: Survival | None) -> dict[str, Any]:
        """What is right on the topic after relearning, if that is asked for. The plain model's checkpoint stays."""
        if survival is None:
            return {}
        name = self._fitted.name(tuned.baseline, tuned.choice.setting)
        figures = survival.figures(subject, name)
        if subject.loader is not self.loader:
            survival.relearning.discard(subject)
        return {"relearned": {"epochs": survival.relearning.about["epochs"], **figures}}

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
        "failed": tuned.failures(),
        **tuned.choice.as_dict(),
    }
