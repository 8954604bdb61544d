"""From a trial to a checkpoint: estimate, read, train, write. What the methods that are trained share.

`Plan` is what tells them apart. The result is a folder (`checkpoint.py`) that transformers or PEFT loads.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.adapters import merged
from saeguard.baselines import memory
from saeguard.baselines.adapting import no_reference, reference_of, trainable, trained_weights
from saeguard.baselines.catalogue import Trial
from saeguard.baselines.checkpoint import (
    compute_dtype,
    copy_adapter,
    digest,
    identity,
    new_folder,
    save_model,
    write_record,
)
from saeguard.baselines.likelihood import Batch, Loss
from saeguard.baselines.memory import Needs
from saeguard.baselines.texts import Pairs, Texts, batches_of, pad_id_of
from saeguard.baselines.training import Job, Outcome, computing_in, train
from saeguard.baselines.utility import StoppingRule
from saeguard.baselines.weight_settings import Training
from saeguard.corpus import Corpus
from saeguard.errors import BaselineError
from saeguard.model import empty_model, load_model, pick_device, text_config

Weights = Mapping[str, Tensor]
"""By parameter name."""
READ_BEFORE = 64
"""Windows of each kind from which an objective reads what it needs."""


@dataclass(frozen=True)
class Setup:
    """What an objective is made from: the model before training, and some of the texts in batches."""

    model: nn.Module
    forget: Sequence[Batch]
    retain: Sequence[Batch]


@dataclass(frozen=True)
class Plan:
    """What a method brings to a training.

    `before`: the loss asks for the model before. `modules`: names of those that are trained, where not all are.
    `blocks`: how many are run, where not all. `combine` makes the result of the weights before and after; the settings
    `unused` serve it alone, so that trainings of one `name` which differ only in them are one.
    """

    name: str
    objective: Callable[[Setup], Loss]
    before: bool = False
    modules: Callable[[nn.Module], Sequence[str]] | None = None
    blocks: int | None = None
    combine: Callable[[Weights, Weights], dict[str, Tensor]] | None = None
    unused: tuple[str, ...] = ()


def run_plan(trial: Trial, plan: Plan) -> None:
    """Train as planned and write `trial.out`. Raises a `GuardrailError` by cause."""
    started, settings = time.perf_counter(), trial.settings
    _check_settings(settings)
    model, tokenizer, needs = load_checked(trial, lambda shapes: _needs(trial, plan, shapes))
    compute, device = compute_dtype(model), model.device
    texts = read_texts(trial, tokenizer)
    record = identity(trial, model, tokenizer, texts)
    used = {name: value for name, value in vars(settings).items() if name not in plan.unused}
    folder = trial.work / f"{plan.name}-{digest(record | {'method': plan.name, 'settings': used})}"
    outcome = train(_job(trial, plan, (model.float(), tokenizer, compute), texts, folder), show_progress=True)
    del model  # there is room for the result, which is read from its checkpoint
    record |= {
        "steps": outcome.step, "ended": outcome.ended, "utility_before": outcome.utility_before,
        "utility_after": outcome.utility_after, "estimated_bytes": needs.bytes,
    }  # fmt: skip
    with new_folder(trial.out) as new:
        if settings.lora_rank and plan.combine is None:
            copy_adapter(outcome.checkpoint, new)
        else:
            save_model(_result(trial, plan, outcome), tokenizer, compute, new)
        write_record(new, record, started, device)
    if plan.combine is None:
        shutil.rmtree(folder)


def load_checked(trial: Trial, needs_of: Callable[[Any], Needs]) -> tuple[Any, Any, Needs]:
    """Model, tokenizer and the memory needed, known before the model is read where the trial says what it is.

    Raises `DoesNotFitError`.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if trial.source is not None:
        needs = needs_of(empty_model(trial.source))
        memory.check(needs, pick_device(trial.device))
        return *trial.load(), needs
    model, tokenizer = trial.load()
    needs = needs_of(model)
    memory.check(needs, str(model.device), held=memory.size(model))
    return model, tokenizer, needs


def read_texts(trial: Trial, tokenizer: Any) -> Texts:
    """The windows of a trial. Raises `CorpusError`."""
    retain = {name: Corpus.of(name, "retain", file) for name, file in trial.retain.items()}
    return Texts.read(tokenizer, Corpus.of("forget", "forget", trial.forget), retain, trial.settings.max_tokens)


def shape_of(model: Any) -> dict[str, int]:
    """The sizes that an estimate is made of."""
    config = text_config(model)
    return {
        "weights": sum(weight.numel() for weight in model.parameters()),
        "blocks": config.num_hidden_layers, "d_model": config.hidden_size,
        "d_ff": getattr(config, "intermediate_size", None) or 4 * config.hidden_size, "vocabulary": config.vocab_size,
    }  # fmt: skip


def _needs(trial: Trial, plan: Plan, model: Any) -> Needs:
    settings: Training = trial.settings
    modules = None if plan.modules is None else plan.modules(model)
    shape = shape_of(model)
    if plan.blocks is not None:
        shape |= {"blocks": plan.blocks, "vocabulary": 0}
    return Needs(
        **shape, trained=trained_weights(model, modules, settings.lora_rank),
        copies=2 if plan.before and not settings.lora_rank else 1,
        tokens=settings.max_tokens * settings.batch // settings.accumulate * (2 if trial.retain else 1),
    )  # fmt: skip


def _job(trial: Trial, plan: Plan, loaded: tuple[Any, Any, torch.dtype], texts: Texts, folder: Any) -> Job:
    """Everything a training needs; the model is changed. The seed is set before anything random."""
    model, tokenizer, compute = loaded
    settings: Training = trial.settings
    torch.manual_seed(trial.seed)
    pad_id = pad_id_of(tokenizer)
    forget = batches_of(texts.forget[:READ_BEFORE], settings.batch, pad_id, model.device)
    retain = batches_of(texts.mixed(READ_BEFORE), settings.batch, pad_id, model.device)
    held_out = batches_of(texts.held_out, settings.batch, pad_id, model.device)
    loss = plan.objective(Setup(model, forget, retain))
    modules = None if plan.modules is None else plan.modules(model)
    with computing_in(compute, model.device):
        rule = StoppingRule.of(model, held_out, settings.keep_utility)
    adapted = trainable(model, modules, settings.lora_rank)
    return Job(
        adapted, tokenizer, pad_id, loss, reference_of(adapted) if plan.before else no_reference,
        Pairs(texts, settings.steps * settings.batch, trial.seed), rule, settings, compute, folder, trial.seed,
    )  # fmt: skip


def _result(trial: Trial, plan: Plan, outcome: Outcome) -> Any:
    """The whole model that training led to."""
    if trial.settings.lora_rank:
        after = merged(trial.load()[0].float(), outcome.checkpoint)
    else:
        after, _ = load_model(outcome.checkpoint, device="cpu", dtype="float32")
    if plan.combine is None:
        return after
    model = trial.load()[0].float()
    tuned = {name: weight.to(model.device) for name, weight in after.named_parameters()}
    with torch.no_grad():
        weights: Mapping[str, Tensor] = dict(model.named_parameters())
        for name, weight in plan.combine(weights, tuned).items():
            weights[name].copy_(weight)
    return model


def _check_settings(settings: Training) -> None:
    if settings.batch % settings.accumulate or min(settings.steps, settings.batch, settings.check_every) < 1:
        raise BaselineError.mismatch(
            "steps, batch, accumulate, check_every",
            found=(settings.steps, settings.batch, settings.accumulate, settings.check_every),
            expected="at least 1 each, and batch a multiple of accumulate", fix="No step could be taken.",
        )  # fmt: skip
