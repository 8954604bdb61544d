"""Choosing among settings: each is judged on dev items, one is taken.

The rule: of the settings that keep accuracy off the topic (near and far together) within a tolerance of the unguarded
model's, the one with the lowest accuracy on the topic; if none does, the one that keeps most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from saeguard.choices import Role
from saeguard.errors import EvaluationError
from saeguard.evaluation.harness import Settings, TaskRun, evaluate
from saeguard.evaluation.statistics import Estimate, as_columns, estimate
from saeguard.evaluation.subject import Subject
from saeguard.evaluation.task import ROLES, Dev, Record, Task
from saeguard.progress import Advance

Setting = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """A setting and how it did on dev items: by role, and near and far together."""

    setting: Setting
    accuracy: Mapping[Role, Estimate]
    triggered: Mapping[Role, Estimate]
    kept: Estimate

    @classmethod
    def of(cls, setting: Setting, runs: Sequence[TaskRun], subject: str, seed: int) -> Point:
        """From runs on dev items; raises `EvaluationError` for any other."""
        if not all(isinstance(run.side, Dev) for run in runs):
            raise EvaluationError("settings are chosen on dev items only")
        records = [record for run in runs for record in run.records[subject]]
        by_role = {role: [r for r in records if r.role == role] for role in ROLES}
        found = {role: its for role, its in by_role.items() if its}
        return cls(
            setting=setting,
            accuracy={role: accuracy_of(its, seed) for role, its in found.items()},
            triggered={role: estimate("rate", as_columns([bool(r.triggered) for r in its]), seed)
                       for role, its in found.items()},
            kept=accuracy_of([r for r in records if r.role != "topic"], seed),
        )  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The settings that were tried, which was chosen, and what the unguarded model keeps off the topic."""

    points: Sequence[Point]
    chosen: int
    unguarded: Estimate
    tolerance: float

    @property
    def setting(self) -> Setting:
        """The chosen one."""
        return self.points[self.chosen].setting

    def as_dict(self) -> dict[str, Any]:
        """For the result."""
        kept = self.points[self.chosen].kept.value >= self.unguarded.value - self.tolerance
        return {
            "points": [asdict(point) for point in self.points],
            "chosen": self.chosen,
            "unguarded": asdict(self.unguarded),
            "rule": f"Chosen on dev items: of the settings that keep accuracy off the topic, up to "
            f"{self.tolerance:.1%}, at the unguarded model's, the one with the lowest accuracy on the topic.",
            "note": "" if kept else "None keeps that much: this is the one that keeps most.",
        }


@dataclass(frozen=True)
class Trials:
    """How settings are judged: the unguarded model, the tasks, and where finished answers are kept."""

    unguarded: Subject
    tasks: Sequence[Task]
    settings: Settings
    work: Path
    tolerance: float

    def choose(self, grid: Sequence[Setting], subject_of: Callable[[Setting], Subject], advance: Advance) -> Choice:
        """Judge the subject of every setting on dev items and take one; `advance` is told each one done."""
        dev, seed = replace(self.settings, split="dev"), self.settings.seed
        points: list[Point] = []
        for setting in grid:
            subject = subject_of(setting)
            runs = evaluate([self.unguarded, subject], self.tasks, dev, work=self.work)
            points.append(Point.of(setting, runs, subject.name, seed))
            advance(1)
        before = Point.of({}, runs, self.unguarded.name, seed).kept
        return Choice(points, choose(points, before.value - self.tolerance), before, self.tolerance)


def choose(points: Sequence[Point], least: float) -> int:
    """The index of the point to take, by the rule; `least` is the accuracy that must be kept off the topic."""
    keeping = [i for i, point in enumerate(points) if point.kept.value >= least]
    if not keeping:
        return max(range(len(points)), key=lambda i: points[i].kept.value)
    return min(keeping, key=lambda i: (points[i].accuracy["topic"].value, -points[i].kept.value))


def accuracy_of(records: Sequence[Record], seed: int) -> Estimate:
    """The share of right answers."""
    return estimate("rate", as_columns([record.scores["accuracy"] for record in records]), seed)
