"""RMU (Li et al. 2024, arXiv 2403.03218): forget text is sent along a random direction.

    L = E_forget || h_now(t) - c u ||^2 + alpha E_retain || h_now(t) - h_before(t) ||^2

h is the residual stream after the layer, u a random vector of length 1 with entries drawn from [0, 1), and the mean
is over tokens and dimensions, as in the authors' code. Trained are the down projections of the MLPs of the layer and
of the two before it. The first token of a window does not count (the authors count it).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.likelihood import Batch, Loss, Pair, Reference
from saeguard.baselines.streams import counted, residuals, squared_distance
from saeguard.baselines.weight_settings import RMU
from saeguard.baselines.weights import Plan, Setup, run_plan
from saeguard.errors import ModelError
from saeguard.hookpoints import MLP
from saeguard.model import decoder_layer

TRAINED_LAYERS = 3
DEFAULT_LAYER = 6
"""That of the embedded SAE, a fifth of the depth; the authors take 7 of 32, arXiv 2504.08192 3 of 26."""
DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "wo")


def control_vector(settings: RMU, layer: int, seed: int, model: nn.Module, batch: Batch) -> Tensor:
    """c u (d_model,): of length `coeff`, or `strength` times the median norm of the residual stream on a batch."""
    with torch.no_grad():
        stream = residuals(model, [layer], batch)[layer]
    unit = torch.rand(stream.shape[-1], generator=torch.Generator().manual_seed(seed))
    unit = unit / unit.norm()
    length = settings.coeff
    if length is None:
        norms = torch.linalg.vector_norm(stream[counted(batch)], dim=-1)
        length = settings.strength * float(norms.median())
    control: Tensor = length * unit.to(batch["input_ids"].device)
    return control


def loss(settings: RMU, layer: int, control: Tensor, model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
    """L of a batch."""
    forget, retain = pair["forget"], pair["retain"]
    with reference() as before:
        kept = residuals(before, [layer], retain)[layer]
    misdirected = squared_distance(residuals(model, [layer], forget)[layer], control, counted(forget))
    moved = squared_distance(residuals(model, [layer], retain)[layer], kept, counted(retain))
    return misdirected + settings.retain_weight * moved


def trained_modules(layer: int, model: nn.Module) -> Sequence[str]:
    """Names of the down projections that are trained. Raises `ModelError` where an MLP has none."""
    names = {module: name for name, module in model.named_modules()}
    trained = range(max(0, layer - TRAINED_LAYERS + 1), layer + 1)
    return [names[_down_projection(decoder_layer(model, one))] for one in trained]


def run(trial: Trial) -> None:
    """Train and write the checkpoint."""
    layer = DEFAULT_LAYER if trial.layer is None else trial.layer

    def objective(setup: Setup) -> Loss:
        control = control_vector(trial.settings, layer, trial.seed, setup.model, setup.forget[0])
        return partial(loss, trial.settings, layer, control)

    run_plan(trial, Plan("rmu", objective, before=True, modules=partial(trained_modules, layer), blocks=layer + 1))


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
