"""Training by the Trainer of transformers: one batch of pairs a step, looks at the stopping rule, checkpoints.

A checkpoint is written only in a good state: finite weights, and the utility that the rule asks for. The last one is
the result. Weights are float32; the passes compute in the precision that is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from saeguard.baselines.likelihood import Loss, Reference
from saeguard.baselines.texts import Pairs, collate
from saeguard.baselines.utility import StoppingRule
from saeguard.baselines.weight_settings import Training
from saeguard.errors import BaselineError, NonFiniteLossError
from saeguard.progress import Advance, progress

STATE_FILE = "trainer_state.json"
OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True)
class Job:
    """A model ready to be trained, and what it is trained on. `folder` keeps the checkpoints.

    `start` is a checkpoint of another training, of fewer steps, that this one goes on from.
    """

    model: nn.Module
    tokenizer: Any
    pad_id: int
    loss: Loss
    reference: Reference
    pairs: Pairs
    rule: StoppingRule
    settings: Training
    compute: torch.dtype
    folder: Path
    seed: int
    start: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """The checkpoint that is the result, its step, why training ended, and what its utility is.

    The utilities are None where there is no stopping rule.
    """

    checkpoint: Path
    step: int
    ended: str
    utility_before: float | None
    utility_after: float | None


def train(job: Job, *, show_progress: bool) -> Outcome:
    """Train, from the last checkpoint where there is one. Raises `NonFiniteLossError` or `BaselineError`."""
    if (outcome := finished(job.folder)) is not None:
        return outcome
    start = last_checkpoint(job.folder) or job.start
    done = 0 if start is None else _step_of(start)
    with progress("training", job.settings.steps, unit="steps", show=show_progress, done=done) as advance:
        looks = _Looks(job, advance)
        trainer = _Unlearning(job, looks)
        if done < job.settings.steps:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
    result = last_checkpoint(job.folder)
    if result is None:
        raise BaselineError(f"{looks.ended}, the first look: nothing good was left to keep. Lower --learning-rate.")
    utility = _state_of(result)["log_history"][-1]["utility"]
    outcome = Outcome(result, _step_of(result), looks.ended or "all steps were done", job.rule.before, utility)
    (job.folder / OUTCOME_FILE).write_text(json.dumps({**vars(outcome), "checkpoint": result.name}), "utf-8")
    return outcome


def finished(folder: Path) -> Outcome | None:
    """The outcome of a training that has ended."""
    path = folder / OUTCOME_FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text("utf-8"))
    return Outcome(**{**found, "checkpoint": folder / found["checkpoint"]})


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written whole: the trainer's state is the last file of one."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{STATE_FILE}") if _state_of(path.parent)]
    return max(found, key=_step_of, default=None)


class _Unlearning(Trainer):
    """The Trainer with a loss on pairs."""

    def __init__(self, job: Job, looks: _Looks) -> None:
        settings = job.settings
        device = next(job.model.parameters()).device
        arguments = TrainingArguments(
            output_dir=str(job.folder), max_steps=settings.steps, learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch // settings.accumulate,
            gradient_accumulation_steps=settings.accumulate, lr_scheduler_type="constant",
            seed=job.seed, data_seed=job.seed, use_cpu=device.type == "cpu", dataloader_pin_memory=False,
            save_strategy="no", save_total_limit=1, logging_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, label_names=[],
        )  # fmt: skip
        arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs would get a DataParallel, past which hooks do not see
        super().__init__(
            model=job.model, args=arguments, train_dataset=job.pairs, processing_class=job.tokenizer,
            data_collator=partial(collate, pad_id=job.pad_id), callbacks=[looks],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)  # standard output is for the command's own
        self.model_accepts_loss_kwargs = False
        self._job = job

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The method's loss. Raises `NonFiniteLossError`."""
        with computing_in(self._job.compute, self.args.device):
            value = self._job.loss(model, self._job.reference, inputs)
        if not torch.isfinite(value):
            raise not_finite(f"the loss is {float(value.detach())}", self.state.global_step + 1, self._job)
        return value

    def floating_point_ops(self, inputs: Any) -> int:
        """None are counted: what a pair costs is the loss's affair."""
        return 0


class _Looks(TrainerCallback):
    """What happens after a step: progress, and now and then the stopping rule and a checkpoint."""

    def __init__(self, job: Job, advance: Advance) -> None:
        self._job, self._advance = job, advance
        self.ended = ""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Look, and decide whether to keep this state, or to stop."""
        self._advance(1)
        if state.global_step % self._job.settings.check_every and state.global_step < state.max_steps:
            return control
        weights = (weight for weight in self._job.model.parameters() if weight.requires_grad)
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            raise not_finite("a weight is NaN or infinite", state.global_step, self._job)
        rule = self._job.rule
        with computing_in(self._job.compute, args.device):
            utility = rule.now(self._job.model)
        if rule.allows(utility):
            control.should_save = True
            state.log_history.append(cast(Any, {"step": state.global_step, "utility": utility}))
        else:
            control.should_training_stop = True
            self.ended = f"utility fell from {rule.before:.4f} to {utility:.4f} by step {state.global_step}"
        return control


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to a precision; float32 is left as it is."""
    context: Callable[..., AbstractContextManager[Any]] = torch.autocast
    return context(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def not_finite(what: str, step: int, job: Job) -> NonFiniteLossError:
    """The error, which says the step and where the last good state is."""
    kept = last_checkpoint(job.folder)
    where = "no earlier state was kept" if kept is None else f"the state after step {_step_of(kept)} is kept in {kept}"
    error = NonFiniteLossError(
        f"{what} at step {step} of {job.settings.steps}; {where}. Lower --learning-rate, or --dtype float32."
    )
    error.step, error.checkpoint = step, None if kept is None else str(kept)
    return error


def _state_of(checkpoint: Path) -> dict[str, Any]:
    """What the trainer wrote last; nothing where it was killed while it did."""
    try:
        return dict(json.loads((checkpoint / STATE_FILE).read_text("utf-8")))
    except ValueError:
        return {}


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
