"""Whether an SAE can be run on a model and a layer at all; whether it belongs there, `saeguard.doctor` finds out."""

from __future__ import annotations

from torch import nn

from saeguard.errors import SAEMismatchError
from saeguard.hookpoints import HookPoint
from saeguard.model import width_of
from saeguard.sae.autoencoder import SparseAutoencoder


def check_fits(model: nn.Module, sae: SparseAutoencoder, layer: int) -> None:
    """Refuse a layer or hook point the model lacks, and an SAE of another width."""
    widths = {sae.hook: sae.W_enc.shape[0], sae.hook_out: sae.W_dec.shape[1]}
    for hook, found in widths.items():
        width = width_of(model, HookPoint(layer, hook))
        if found != width:
            raise SAEMismatchError.mismatch(
                f"width of the SAE at {hook}", found=found, expected=f"{width}, that of {type(model).__name__}",
                fix="Use an SAE trained on this model.",
            )  # fmt: skip
