"""Qwen-Scope (Qwen/SAE-Res-MODEL-WnnK-L0_k): `layerN.sae.pt` for each layer. TopK, then ReLU; no input bias.

Weights `W_enc` (d_sae, d_model), `W_dec` (d_model, d_sae), `b_enc`, `b_dec`; k is in the repository's name only.
"""

from __future__ import annotations

import re
from pathlib import Path

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import SparseAutoencoder, TopK
from saeguard.sae.formats.place import Origin, Place, layer_in
from saeguard.sae.tensors import read_tensors


def find(place: Place) -> Path | None:
    """`layerN.sae.pt`."""
    return place.file("layer*.sae.pt")


def read(path: Path, origin: Origin) -> SparseAutoencoder:
    """TopK, both weights transposed."""
    named = re.search(r"SAE-Res-(.+)-W\d+K-L0_(\d+)", origin.address)
    if named is None:
        raise SAEError.mismatch(
            f"where k is to be found for {origin.source}", found="no such name",
            expected="SAE-Res-MODEL-WnnK-L0_k in its path, as in its repository",
            fix="Keep the file in a folder of the repository's name.",
        )  # fmt: skip
    stored = read_tensors(path, ("W_enc", "W_dec", "b_enc", "b_dec"))
    return SparseAutoencoder(
        W_enc=stored["W_enc"].T, b_enc=stored["b_enc"],
        W_dec=stored["W_dec"].T, b_dec=stored["b_dec"],
        activation=TopK(int(named[2])), source=origin.source,
        metadata={"model_name": f"Qwen/{named[1]}", "layer": layer_in(path.stem), "hook": "resid_post"},
    )  # fmt: skip
