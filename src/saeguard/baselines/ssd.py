"""Selective synaptic dampening (Foster et al. 2024, arXiv 2308.07707, equations 3 to 5): no training.

    I(theta) = E over windows of ( d NLL / d theta )^2              the diagonal of the Fisher information
    theta' = b theta  where I_forget > alpha I_retain,  with b = min( lambda I_retain / I_forget, 1 );  theta elsewhere

I_retain is over retain text in place of the paper's whole training set, which is not to be had for a language model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from saeguard.baselines.config import SSD
from saeguard.baselines.likelihood import Batch, nll

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
