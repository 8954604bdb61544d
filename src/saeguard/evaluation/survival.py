"""Survival under relearning: a judged method's model is trained further on the topic, and asked about it again.

How it is trained is said by a `Relearning` (attacks/relearn_forget.py). Figures are kept under a key that is known
without the trained model, so its checkpoints may go once they are there, and nothing is trained again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from saeguard.errors import NonFiniteLossError
from saeguard.evaluation.choosing import accuracy_of
from saeguard.evaluation.harness import Settings, evaluate
from saeguard.evaluation.provenance import code_fingerprint, items_fingerprint
from saeguard.evaluation.result import write_result
from saeguard.evaluation.subject import Opened, Subject
from saeguard.evaluation.task import Item, Record, Task, limited, split


class Relearning(Protocol):
    """A way to train what is judged further. `about` says what is done, for JSON: all that its result depends on."""

    @property
    def about(self) -> Mapping[str, Any]:
        """For JSON."""

    def after(self, subject: Subject) -> Subject:
        """The subject with its model trained further, under the gate or guardrail that it had, whose check of the
        weights is overridden. Raises a `GuardrailError`."""

    def discard(self, subject: Subject) -> None:
        """Remove what training it further has left."""


Relearn = Callable[[Sequence[Item]], Relearning]
"""A way to train further that shows something about these questions. Raises a `GuardrailError` where there is none."""


class OnTopic(Task):
    """The items of another task that are on the topic."""

    def __init__(self, task: Task) -> None:
        self.task, self.name, self.measures, self.whole = task, task.name, task.measures, task.whole

    @property
    def settings(self) -> Mapping[str, Any]:
        """As of the other task."""
        return self.task.settings

    def items(self) -> Sequence[Item]:
        """Those on the topic."""
        return [item for item in self.task.items() if item.role == "topic"]

    def batches(self, tokenizer: Any, items: Sequence[Any]) -> list[list[Any]]:
        """As of the other task."""
        return self.task.batches(tokenizer, items)

    def run(self, it: Opened, batch: Sequence[Any], seed: int) -> list[Record]:
        """As of the other task."""
        return self.task.run(it, batch, seed)


@dataclass(frozen=True)
class Survival:
    """The test questions on the topic of some tasks, asked after relearning. `work` keeps answers and figures."""

    relearning: Relearning
    tasks: Sequence[Task]
    asked: str
    settings: Settings
    work: Path

    @classmethod
    def of(cls, relearn: Relearn, tasks: Sequence[Task], settings: Settings, work: Path) -> Survival:
        """Of the tasks that have questions on the topic. Raises an `EvaluationError`."""
        found = [task for task in map(OnTopic, tasks) if task.items()]
        test = replace(settings, split="test")
        asked = [item for task in found for item in limited(split(task.items())[1].items, test.limit)]
        return cls(relearn(asked), found, items_fingerprint(asked), test, work)

    def figures(self, subject: Subject, identity: Any) -> dict[str, Any]:
        """`accuracy` after relearning, or why the model could not be trained further, for JSON.

        `identity` says what the subject was before. Raises a `GuardrailError`.
        """
        parts = [
            identity, subject.name, self.relearning.about, self.asked, asdict(self.settings),
            [[task.name, dict(task.settings)] for task in self.tasks], code_fingerprint(),
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        path = self.work / "relearned" / f"{subject.name}-{key}.json"
        if not path.is_file():
            write_result(self._asked_after(subject), path)
        return dict(json.loads(path.read_text("utf-8")))

    def _asked_after(self, subject: Subject) -> dict[str, Any]:
        try:
            after = self.relearning.after(subject)
        except NonFiniteLossError as error:
            return {"failed": f"a loss or weight became NaN or infinite at step {error.step}"}
        runs = evaluate([after], self.tasks, self.settings, work=self.work / "answers")
        records = [record for run in runs for record in run.records[after.name]]
        return {"accuracy": asdict(accuracy_of(records, self.settings.seed))}
