"""Gemma Scope 1 (google/gemma-scope-{2b,9b,27b}-{pt,it}-{res,mlp,att}): `params.npz`, JumpReLU, no input bias.

Weights `W_enc` (d_model, d_sae), `W_dec` (d_sae, d_model), `b_enc`, `b_dec`, `threshold`, float32. Folders are
`layer_L/width_16k/average_l0_N`; the site is in the repository's name. Embedding SAEs are scaled by sqrt(d_model).
"""

from __future__ import annotations

import re
from pathlib import Path

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder
from saeguard.sae.formats.place import Place, layer_in
from saeguard.sae.tensors import read_tensors

HOOKS = {"res": "resid_post", "mlp": "mlp_out", "att": "attn_z"}


def find(place: Place) -> Path | None:
    """`params.npz`, or another npz file that was named."""
    return place.file("params.npz") or (place.file("*.npz") if place.named else None)


def read(path: Path, source: str) -> SparseAutoencoder:
    """JumpReLU as it is stored."""
    if "embedding" in Path(source).parts:
        raise SAEError(f"{source} is an SAE of the embedding, before every layer: choose one of a layer.")
    weights = read_tensors(path, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"))
    threshold = weights.pop("threshold")
    site = re.search(r"gemma-scope-(\w+)-(pt|it)-(res|mlp|att)", source)
    metadata = {
        "layer": layer_in(source),
        "hook": HOOKS[site[3]] if site else "resid_post",
        "model_name": f"google/gemma-2-{site[1]}{'-it' if site[2] == 'it' else ''}" if site else None,
    }
    return SparseAutoencoder(**weights, activation=JumpReLU(threshold), source=source, metadata=metadata)
