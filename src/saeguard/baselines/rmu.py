"""RMU (Li et al. 2024, arXiv 2403.03218, section 4): forget text is sent along a random direction.

    L = E_forget || h_now(t) - c u ||^2 + alpha E_retain || h_now(t) - h_before(t) ||^2

h is the residual stream after the layer, u a random vector of length 1 with entries drawn from [0, 1), and the mean
is over tokens and dimensions, as in the authors' code. Trained are the down projections of the MLPs of the layer and
of the two before it. The first token of a window does not count (the authors count it).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saeguard.baselines.config import RMU
from saeguard.baselines.likelihood import Batch, Pair, Reference
from saeguard.baselines.streams import counted, median_norm, residuals, squared_distance
from saeguard.errors import ModelError
from saeguard.hookpoints import MLP
from saeguard.model import decoder_layer

TRAINED_LAYERS = 3
DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "wo")


def control_vector(settings: RMU, model: nn.Module, batch: Batch) -> Tensor:
    """c u (d_model,): of length `coeff`, or `strength` times the median norm of the residual stream on a batch."""
    with torch.no_grad():
        streams = residuals(model, [settings.layer], batch)
    unit = torch.rand(streams[settings.layer].shape[-1], generator=torch.Generator().manual_seed(settings.seed))
    unit = unit / unit.norm()
    length = settings.coeff
    if length is None:
        length = settings.strength * median_norm(streams, settings.layer, counted(batch))
    return length * unit.to(batch["input_ids"].device)


def loss(settings: RMU, control: Tensor, model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
    """L of a batch."""
    forget, retain, layer = pair["forget"], pair["retain"], settings.layer
    with reference() as before:
        kept = residuals(before, [layer], retain)[layer]
    misdirected = squared_distance(residuals(model, [layer], forget)[layer], control, counted(forget))
    moved = squared_distance(residuals(model, [layer], retain)[layer], kept, counted(retain))
    return misdirected + settings.retain_weight * moved


def trained_modules(settings: RMU, model: nn.Module) -> Sequence[str]:
    """Names of the down projections that are trained. Raises `ModelError` where an MLP has none."""
    names = {module: name for name, module in model.named_modules()}
    first = max(0, settings.layer - TRAINED_LAYERS + 1)
    return [names[_down_projection(decoder_layer(model, layer))] for layer in range(first, settings.layer + 1)]


def _down_projection(block: nn.Module) -> nn.Module:
    parts = (getattr(block, name, None) for name in MLP)
    mlp = next((part for part in parts if isinstance(part, nn.Module)), block)
    for name in DOWN:
        if isinstance(found := getattr(mlp, name, None), nn.Module):
            return found
    raise ModelError.mismatch(
        f"parts of {type(mlp).__name__}", found=[name for name, _ in mlp.named_children()],
        expected=f"a down projection: one of {', '.join(DOWN)}", fix="RMU cannot be trained on this model.",
    )  # fmt: skip
