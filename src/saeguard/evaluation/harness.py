"""`evaluate`: tasks on subjects. Every subject gets the same items in the same batches with the same seed.

tasks -> items, each once -> split -> (filter by the unguarded model) -> batches -> records -> result
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from saeguard.errors import EvaluationError
from saeguard.evaluation.ledger import Ledger
from saeguard.evaluation.provenance import code_fingerprint, items_fingerprint
from saeguard.evaluation.subject import Subject
from saeguard.evaluation.task import Every, Item, Record, Side, Task, limited, split
from saeguard.progress import Advance, progress

Split = Literal["dev", "test", "all"]


@dataclass(frozen=True)
class Settings:
    """How a run is made; all of it is in the result."""

    split: Split = "test"
    limit: int | None = None
    keep_text: bool = False
    seed: int = 0


@dataclass(frozen=True)
class TaskRun:
    """One task's records by subject, and what they are of."""

    task: Task
    side: Side
    repeated: int
    filtered: int
    records: dict[str, list[Record]]

    @property
    def items(self) -> tuple[Item, ...]:
        """The items that were run."""
        return self.side.items


@dataclass(frozen=True)
class _Planned:
    task: Task
    side: Side
    repeated: int

    @property
    def items(self) -> list[Item]:
        return list(self.side.items)


def evaluate(
    subjects: Sequence[Subject],
    tasks: Sequence[Task],
    settings: Settings,
    *,
    work: Path | None = None,
    show_progress: bool = False,
) -> list[TaskRun]:
    """Run every task on every subject; the first subject is the reference. `work` keeps what is finished.

    Raises a `GuardrailError` by cause: `EvaluationError` where a task has no items.
    """
    names = [subject.name for subject in subjects]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise EvaluationError(f"two subjects have one name: {', '.join(twice)}. Give each its own with NAME=...")
    plans = [_planned(task, settings) for task in tasks]
    total = sum(_amount(plan, len(subjects)) for plan in plans)
    with progress("judging", total, unit="items", show=show_progress) as advance:
        return [_run(plan, subjects, settings, work, advance) for plan in plans]


def _planned(task: Task, settings: Settings) -> _Planned:
    found = task.items()
    items = tuple({item.id: item for item in reversed(found)}.values())[::-1]
    dev, test = split(items)
    sides: dict[Split, Side] = {"dev": dev, "test": test, "all": Every(items)}
    side = Every(items) if task.whole else sides[settings.split]
    return _Planned(task, replace(side, items=tuple(limited(side.items, settings.limit))), len(found) - len(items))


def _amount(plan: _Planned, subjects: int) -> int:
    return len(plan.items) * (subjects + (plan.task.filter is not None))


def _run(
    plan: _Planned, subjects: Sequence[Subject], settings: Settings, work: Path | None, advance: Advance
) -> TaskRun:
    task, items = plan.task, plan.items
    if task.filter is not None:
        kept = {r.item for r in _records(task.filter, items, subjects[0], settings, work, advance) if r.scores["kept"]}
        advance((len(items) - len(kept)) * len(subjects))
        items = [item for item in items if item.id in kept]
    if not items:
        why = f"the protocol keeps none of {len(plan.items)}" if plan.items else f"none is on the {settings.split} side"
        raise EvaluationError(f"the task {task.name} has no items left: {why}. Give it more, or other settings.")
    records = {subject.name: _records(task, items, subject, settings, work, advance) for subject in subjects}
    return TaskRun(task, replace(plan.side, items=tuple(items)), plan.repeated, len(plan.items) - len(items), records)


def _records(
    task: Task, items: Sequence[Item], subject: Subject, settings: Settings, work: Path | None, advance: Advance
) -> list[Record]:
    """The records of one task on one subject: what is finished is taken from the ledger, the rest is run."""
    batches = task.batches(subject.loader.loaded[1], items)
    ledger = Ledger(work, _identity(task, items, subject, settings))
    missing = [i for i in range(len(batches)) if i not in ledger]
    advance(sum(len(batch) for i, batch in enumerate(batches) if i in ledger))
    if missing:
        with subject.open() as it:
            for i in missing:
                torch.manual_seed(settings.seed)
                records = task.run(it, batches[i], settings.seed)
                ledger.add(i, records if settings.keep_text else [_without_texts(record) for record in records])
                advance(len(batches[i]))
    return ledger.records()


def _without_texts(record: Record) -> Record:
    return Record(**{**asdict(record), "texts": {}})


def _identity(task: Task, items: Sequence[Item], subject: Subject, settings: Settings) -> Any:
    return [
        task.name, dict(task.settings), items_fingerprint(items), subject.fingerprint, settings.seed,
        settings.keep_text, code_fingerprint(),
    ]  # fmt: skip
