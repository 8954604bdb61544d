"""Llama Scope 1 (fnlp/Llama3_1-8B-Base-LX{R,M,A}-{8,32}x): `hyperparams.json` and `checkpoints/final.safetensors`.

Weights `encoder.weight` (d_sae, d_model), `encoder.bias`, `decoder.weight` (d_model, d_sae), `decoder.bias`; one
JumpReLU threshold for all features. Inputs are scaled by s = sqrt(d_model) / dataset_average_activation_norm, which
is folded into the biases: activations are in units of the unscaled input, 1/s of those that SAELens gives. So is the
threshold as it is stored (SAELens issues 482, 483).
"""

from __future__ import annotations

from pathlib import Path

import torch

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder
from saeguard.sae.formats import fold
from saeguard.sae.formats.hookname import input_scaling, place
from saeguard.sae.formats.place import Origin, Place
from saeguard.sae.tensors import read_config, read_tensors

MODEL = "meta-llama/Llama-3.1-8B"


def find(place: Place) -> Path | None:
    """`checkpoints/final.safetensors` beside `hyperparams.json`."""
    path = place.file("checkpoints/final.safetensors")
    return path if path and (path.parent.parent / "hyperparams.json").is_file() else None


def read(path: Path, origin: Origin) -> SparseAutoencoder:
    """JumpReLU, the input scaling folded in."""
    config = read_config(path.parent.parent / "hyperparams.json")
    stored = read_tensors(path, ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"))
    try:
        norm, hook = config["dataset_average_activation_norm"], str(config["hook_point_in"])
        into, out = (config["d_model"] ** 0.5 / float(norm[side]) for side in ("in", "out"))
        threshold = float(config["jump_relu_threshold"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise SAEError(f"hyperparams.json of {origin.source} lacks what its inputs are scaled by: {error!r}") from error
    sae = SparseAutoencoder(
        W_enc=stored["encoder.weight"].T, b_enc=stored["encoder.bias"],
        W_dec=stored["decoder.weight"].T, b_dec=stored["decoder.bias"],
        activation=JumpReLU(torch.full_like(stored["encoder.bias"], threshold * into)), source=origin.source,
        metadata=place(hook, str(config.get("hook_point_out") or ""), MODEL), scaling=input_scaling(hook, MODEL),
    )  # fmt: skip
    return fold.input_scale(sae, into, out)
