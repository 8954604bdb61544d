"""`lm-eval`: any task of the Language Model Evaluation Harness, by name, run on the model inside the guardrail.

The harness calls the model as everyone does, so the guardrail acts in it. Its per-sample scores become records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saeguard.errors import EvaluationError
from saeguard.evaluation.subject import Opened
from saeguard.evaluation.task import Item, Measure, Record, Task, item_id

METRICS = ("acc", "acc_norm", "exact_match", "f1")


@dataclass(frozen=True)
class HarnessItem(Item):
    """One task of the harness."""


@dataclass(frozen=True)
class LMEval(Task):
    """Tasks of the harness; `include` is a folder with tasks of one's own, `samples` bounds the documents of each."""

    tasks: tuple[str, ...]
    include: str | None = None
    samples: int | None = None
    name: str = "lm-eval"
    measures: tuple[Measure, ...] = field(
        default=tuple(Measure(name, "mean", f"{name}, as the harness computes it", "knowledge") for name in METRICS),
        init=False,
    )
    whole: bool = field(default=True, init=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The tasks and how many documents of each."""
        return {"tasks": list(self.tasks), "include": self.include, "samples": self.samples}

    def items(self) -> Sequence[HarnessItem]:
        """One for each task."""
        return [HarnessItem(item_id("lm-eval", name), name, "far") for name in self.tasks]

    def batches(self, tokenizer: Any, items: Sequence[HarnessItem]) -> list[list[HarnessItem]]:
        """A task at a time."""
        return [[item] for item in items]

    def run(self, it: Opened, batch: Sequence[HarnessItem], seed: int) -> list[Record]:
        """Run one task of the harness. Raises `EvaluationError` where it, or its data, cannot be had."""
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise EvaluationError("the task lm-eval needs the harness: pip install 'saeguard[lm-eval]'") from error
        task = batch[0].domain
        try:
            found = simple_evaluate(
                model=HFLM(pretrained=it.model, tokenizer=it.tokenizer, batch_size=8), tasks=[task],
                limit=self.samples, task_manager=TaskManager(include_path=self.include), bootstrap_iters=0,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise EvaluationError(f"lm-eval could not run {task}: {error}") from error
        return [
            Record(item_id(task, subtask, str(sample["doc_id"])), subtask, batch[0].role, _scores(sample))
            for subtask, samples in (found or {})["samples"].items()
            for sample in samples
        ]


def _scores(sample: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(sample[name]) for name in METRICS if isinstance(sample.get(name), int | float)}
