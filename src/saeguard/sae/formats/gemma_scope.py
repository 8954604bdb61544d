"""Gemma Scope 1 (google/gemma-scope-{2b,9b,27b}-{pt,it}-{res,mlp,att,transcoders}): `params.npz`, JumpReLU.

Weights `W_enc` (d_model, d_sae), `W_dec` (d_sae, d_out), `b_enc`, `b_dec`, `threshold`, float32. Folders are
`layer_L/width_16k/average_l0_N`; the site is in the repository's name. There is no input bias. Transcoders read what
the norm before the MLP gives, before its weight. SAEs of the embedding are refused: they are of no layer.
"""

from __future__ import annotations

import re
from pathlib import Path

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder
from saeguard.sae.formats.hookname import input_scaling, place
from saeguard.sae.formats.place import Origin, Place, layer_in
from saeguard.sae.tensors import read_tensors

HOOKS = {
    "res": ("hook_resid_post", ""), "mlp": ("hook_mlp_out", ""), "att": ("attn.hook_z", ""),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}  # fmt: skip
REPOSITORY = re.compile(r"gemma-scope-(\w+)-(pt|it)-(res|mlp|att|transcoders)")


def find(place: Place) -> Path | None:
    """`params.npz`, or another npz file that was named."""
    return place.file("params.npz") or (place.file("*.npz") if place.named else None)


def read(path: Path, origin: Origin) -> SparseAutoencoder:
    """JumpReLU as it is stored. Where the repository's name is lost, the residual stream after the layer is assumed."""
    if "embedding" in Path(origin.address).parts:
        raise SAEError(f"{origin.source} is an SAE of the embedding, before every layer: choose one of a layer.")
    found, layer = REPOSITORY.search(origin.address), layer_in(origin.address)
    model = f"google/gemma-2-{found[1]}{'-it' if found[2] == 'it' else ''}" if found else ""
    metadata, scaling = {"layer": layer, "hook": "resid_post"}, None
    if found and layer is not None:
        into, out = (f"blocks.{layer}.{name}" if name else "" for name in HOOKS[found[3]])
        metadata, scaling = place(into, out, model), input_scaling(into, model)
    weights = read_tensors(path, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"))
    threshold = weights.pop("threshold")
    return SparseAutoencoder(
        **weights, activation=JumpReLU(threshold), source=origin.source, metadata=metadata, scaling=scaling
    )
