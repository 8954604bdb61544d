"""CRISP (Ashuach et al. 2025, arXiv 2508.13650): features of the topic are trained away, by LoRA.

Salient at a layer are the features whose mean activation on forget text is at least `min_ratio` times that on retain
text; of those, the k whose firing rates differ most.

    L = (1 - beta) U + beta (R + gamma C)
    U = mean over layers of  sum of salient activations on forget text / number of those that were active before
    R = mean over layers of  E_retain ( h_now - h_before )^2        C = the same after the last block

The residual streams h are those that the SAEs read. C is on retain text, where the authors write prompts for each
topic by hand. In their code U goes through the mean pre-activation; here it is what is to be suppressed. Adapters are
on the blocks up to the last SAE: later ones cannot change a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.likelihood import Batch, Loss, Pair, Reference
from saeguard.baselines.streams import counted, residuals, squared_distance
from saeguard.baselines.weight_settings import CRISP
from saeguard.baselines.weights import Plan, Setup, run_plan
from saeguard.errors import SelectionError, UsageError
from saeguard.model import decoder_layers, linear_modules
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.statistics import FeatureStatistics

SAEs = Mapping[int, SparseAutoencoder]
Salient = Mapping[int, Sequence[int]]


def statistics(model: nn.Module, saes: SAEs, batches: Iterable[Batch]) -> dict[int, FeatureStatistics]:
    """What the features of each layer do on some texts."""
    found = {layer: FeatureStatistics.empty(sae.d_sae) for layer, sae in saes.items()}
    with torch.no_grad():
        for batch in batches:
            for layer, stream in residuals(model, list(saes), batch).items():
                a = saes[layer].encode(stream[counted(batch)])
                found[layer] = found[layer].merge(FeatureStatistics.of(a))
    return found


def salient(settings: CRISP, forget: FeatureStatistics, retain: FeatureStatistics) -> list[int]:
    """Ids of the features to suppress at a layer, first those whose firing rates differ most."""
    difference = forget.firing_rate - retain.firing_rate
    kept = (difference > 0) & (forget.mean >= settings.min_ratio * retain.mean)
    order = difference.where(kept, -torch.inf).argsort(descending=True, stable=True)
    return order[: min(settings.features, int(kept.sum()))].tolist()


def select(
    settings: CRISP, model: nn.Module, saes: SAEs, forget: Iterable[Batch], retain: Iterable[Batch]
) -> dict[int, list[int]]:
    """The salient features of each layer that has some. Raises `SelectionError` where none has."""
    on_forget, on_retain = statistics(model, saes, forget), statistics(model, saes, retain)
    found = {layer: salient(settings, on_forget[layer], on_retain[layer]) for layer in saes}
    if not any(found.values()):
        raise SelectionError.mismatch(
            f"features {settings.min_ratio} times as active on forget text", found=0, expected="at least 1",
            fix="Lower --min-ratio, or use SAEs of other layers.",
        )  # fmt: skip
    return {layer: ids for layer, ids in found.items() if ids}


def loss(settings: CRISP, saes: SAEs, features: Salient, model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
    """L of a batch."""
    layers, last = list(features), len(decoder_layers(model)) - 1
    forget, retain = pair["forget"], pair["retain"]
    with reference() as before:
        active_before = _activations(saes, features, residuals(before, layers, forget), forget)
        kept = residuals(before, [*layers, last], retain)
    active = _activations(saes, features, residuals(model, layers, forget), forget)
    moved = residuals(model, [*layers, last], retain)
    suppress = sum(active[layer].sum() / (active_before[layer] > 0).sum().clamp(min=1) for layer in layers)
    distance = {layer: squared_distance(moved[layer], kept[layer], counted(retain)) for layer in kept}
    keep = sum(distance[layer] for layer in layers)
    whole = (1 - settings.beta) * suppress + settings.beta * keep
    return torch.as_tensor(whole) / len(layers) + settings.beta * settings.gamma * distance[last]


def _activations(saes: SAEs, features: Salient, streams: Mapping[int, Tensor], batch: Batch) -> dict[int, Tensor]:
    """Activations (counted tokens, k) of the salient features of each layer."""
    mask = counted(batch)
    return {layer: saes[layer].encode(streams[layer][mask])[:, list(ids)] for layer, ids in features.items()}


def trained_modules(saes: SAEs, model: nn.Module) -> Sequence[str]:
    """Names of the linear modules of the blocks that the SAEs depend on."""
    return linear_modules(model, range(max(saes) + 1))


def saes_of(trial: Trial) -> dict[int, SparseAutoencoder]:
    """The SAE of the trial, and those that its settings name, by layer. Raises `UsageError` or `SAEError`."""
    assert trial.sae is not None
    assert trial.layer is not None
    found = {trial.layer: trial.sae}
    for one in trial.settings.more_saes:
        layer, equals, source = one.partition("=")
        if not (layer.isdecimal() and equals and source):
            raise UsageError(f"--more-saes {one}: expected LAYER=SAE, for example 9=my-sae")
        found[int(layer)] = SparseAutoencoder.load(source)
    return found


def run(trial: Trial) -> None:
    """Train and write the adapter."""
    saes = saes_of(trial)
    if not trial.settings.lora_rank:
        raise UsageError("crisp trains adapters: --lora-rank must be at least 1")

    def objective(setup: Setup) -> Loss:
        placed = {layer: sae.to(setup.forget[0]["input_ids"].device) for layer, sae in saes.items()}
        features = select(trial.settings, setup.model, placed, setup.forget, setup.retain)
        return partial(loss, trial.settings, placed, features)

    run_plan(trial, Plan("crisp", objective, before=True, modules=partial(trained_modules, saes)))
