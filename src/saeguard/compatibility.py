"""Whether an SAE belongs to a model and a layer, as far as its file says."""

from __future__ import annotations

from torch import nn

from saeguard.errors import SAEMismatchError
from saeguard.model import decoder_layer, text_config
from saeguard.sae.autoencoder import SparseAutoencoder


def check_fits(model: nn.Module, sae: SparseAutoencoder, layer: int) -> None:
    """Refuse a layer the model lacks, and an SAE of another width, or trained on another layer or hook point."""
    decoder_layer(model, layer)
    width = text_config(model).hidden_size
    if sae.d_model != width:
        raise SAEMismatchError.mismatch(
            "width (d_model) of the SAE", found=sae.d_model, expected=f"{width}, that of {type(model).__name__}",
            fix="Use an SAE trained on this model.",
        )  # fmt: skip
    if (hook := sae.metadata.get("hook", "resid_post")) != "resid_post":
        raise SAEMismatchError.mismatch(
            "hook point of the SAE", found=hook, expected="resid_post, the residual stream after a layer",
            fix="Use an SAE of the residual stream.",
        )  # fmt: skip
    if sae.layer is not None and sae.layer != layer:
        raise SAEMismatchError.mismatch(
            "layer", found=layer, expected=f"{sae.layer}, on which the SAE was trained", fix=f"Use layer {sae.layer}."
        )
