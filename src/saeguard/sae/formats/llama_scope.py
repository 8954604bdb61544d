"""Llama Scope 1 (fnlp/Llama3_1-8B-Base-LX{R,M,A}-{8,32}x): `hyperparams.json` and `checkpoints/final.safetensors`.

Weights `encoder.weight` (d_sae, d_model), `encoder.bias`, `decoder.weight` (d_model, d_sae), `decoder.bias`; one
JumpReLU threshold for all features. Inputs are scaled by s = sqrt(d_model) / dataset_average_activation_norm, which
is folded into the weights; the threshold is in units of the unscaled input (SAELens issues 482, 483), so it is
scaled by s too.
"""

from __future__ import annotations

from pathlib import Path

import torch

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder
from saeguard.sae.formats.place import Place, layer_in
from saeguard.sae.tensors import read_config, read_tensors

HOOKS = {"hook_resid_post": "resid_post", "hook_mlp_out": "mlp_out", "hook_attn_out": "attn_out"}


def find(place: Place) -> Path | None:
    """`checkpoints/final.safetensors` beside `hyperparams.json`."""
    path = place.file("checkpoints/final.safetensors")
    return path if path and (path.parent.parent / "hyperparams.json").is_file() else None


def read(path: Path, source: str) -> SparseAutoencoder:
    """JumpReLU, the input scaling folded in."""
    config = read_config(path.parent.parent / "hyperparams.json")
    stored = read_tensors(path, ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"))
    d_sae, d_model = stored["encoder.weight"].shape
    try:
        norm, hook = config["dataset_average_activation_norm"], str(config["hook_point_in"])
        into, out = (d_model**0.5 / float(norm[side]) for side in ("in", "out"))
        threshold = float(config["jump_relu_threshold"]) * into
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SAEError(f"hyperparams.json of {source} lacks what its inputs are scaled by: {error!r}") from error
    return SparseAutoencoder(
        W_enc=stored["encoder.weight"].T.contiguous() * into, b_enc=stored["encoder.bias"],
        W_dec=stored["decoder.weight"].T.contiguous() / out, b_dec=stored["decoder.bias"] / out,
        activation=JumpReLU(torch.full((d_sae,), threshold)), source=source,
        metadata={
            "model_name": "meta-llama/Llama-3.1-8B", "layer": layer_in(hook), "hook_name": hook,
            "hook": HOOKS.get(hook.rpartition(".")[2], hook.rpartition(".")[2]),
        },
    )  # fmt: skip
