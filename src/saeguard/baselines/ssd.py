"""Selective synaptic dampening (Foster et al. 2024, arXiv 2308.07707): no training.

    I(theta) = E over windows of ( d NLL / d theta )^2              the diagonal of the Fisher information
    theta' = b theta  where I_forget > alpha I_retain,  with b = min( lambda I_retain / I_forget, 1 );  theta elsewhere

I_retain is over retain text in place of the paper's whole training set, which is not to be had for a language model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.checkpoint import compute_dtype, identity, new_folder, save_model, write_record
from saeguard.baselines.likelihood import Batch, nll
from saeguard.baselines.memory import Needs
from saeguard.baselines.texts import batches_of, pad_id_of
from saeguard.baselines.weight_settings import SSD
from saeguard.baselines.weights import load_checked, read_texts, shape_of
from saeguard.progress import Advance, progress

Importances = dict[str, Tensor]


def importances(model: nn.Module, windows: Iterable[Batch]) -> Importances:
    """I by parameter name, over batches of one window each."""
    model.requires_grad_(True)
    total = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    count = 0
    for window in windows:
        model.zero_grad(set_to_none=True)
        nll(model, window).backward()  # type: ignore[no-untyped-call]
        count += 1
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                total[name] += weight.grad.square()
    model.zero_grad(set_to_none=True)
    return {name: sums / max(1, count) for name, sums in total.items()}


@torch.no_grad()
def dampen(
    settings: SSD, model: nn.Module, forget: Mapping[str, Tensor], retain: Mapping[str, Tensor]
) -> dict[str, int]:
    """Change the model in place; how many entries of each parameter were dampened."""
    changed = {}
    for name, weight in model.named_parameters():
        chosen = forget[name] > settings.threshold * retain[name]
        factor = (settings.dampening * retain[name] / forget[name]).clamp(max=1)
        weight.copy_(torch.where(chosen, factor * weight, weight))
        changed[name] = int(chosen.sum())
    return changed


def run(trial: Trial) -> None:
    """Estimate, dampen and write the checkpoint."""
    started, settings = time.perf_counter(), trial.settings
    model, tokenizer, needs = load_checked(trial, partial(_needs, settings))
    compute, device = compute_dtype(model), model.device
    texts = read_texts(trial, tokenizer)
    record = identity(trial, model, tokenizer, texts)
    model = model.float()
    found = {}
    for name, windows in (("forget", texts.forget[: settings.windows]), ("retain", texts.mixed(settings.windows))):
        batches = batches_of(windows, 1, pad_id_of(tokenizer), device)
        with progress(f"importances for {name} text", len(batches), unit="windows") as advance:
            found[name] = importances(model, _counted(batches, advance))
    changed = dampen(settings, model, found["forget"], found["retain"])
    record |= {"dampened": sum(changed.values()), "estimated_bytes": needs.bytes}
    with new_folder(trial.out) as new:
        save_model(model, tokenizer, compute, new)
        write_record(new, record, started, device)


def _needs(settings: SSD, model: Any) -> Needs:
    """Weights, one gradient and two importances each, and the activations of one window."""
    shape = shape_of(model)
    return Needs(**shape, trained=shape["weights"], copies=1, tokens=settings.max_tokens)


def _counted(batches: Sequence[Batch], advance: Advance) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        advance(1)
