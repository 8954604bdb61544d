"""Transcoders for circuit-tracer (mwhanna/qwen3-SIZEb-transcoders[-lowl0]): `layer_N.safetensors`, ReLU, no input bias.

Weights `W_enc` (d_sae, d_model), `b_enc`, `W_dec` (d_sae, d_model, not transposed), `b_dec`. They read what enters the
MLP and write what it adds; the model is in the repository's name only.
"""

from __future__ import annotations

import re
from pathlib import Path

from saeguard.sae.autoencoder import ReLU, SparseAutoencoder
from saeguard.sae.formats.hookname import place
from saeguard.sae.formats.place import Origin, Place, layer_in
from saeguard.sae.tensors import read_tensors


def find(place: Place) -> Path | None:
    """`layer_N.safetensors`."""
    return place.file("layer_[0-9]*.safetensors")


def read(path: Path, origin: Origin) -> SparseAutoencoder:
    """ReLU, the encoder transposed."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    W_enc, b_enc, W_dec, b_dec = map(read_tensors(path, names).__getitem__, names)
    named = re.search(r"qwen3-([\d.]+)b", origin.address.lower())
    block = f"blocks.{layer_in(path.stem)}"
    metadata = place(f"{block}.mlp.hook_in", f"{block}.hook_mlp_out", f"Qwen/Qwen3-{named[1]}B" if named else "")
    return SparseAutoencoder(W_enc.T, b_enc, W_dec, b_dec, ReLU(), source=origin.source, metadata=metadata)
