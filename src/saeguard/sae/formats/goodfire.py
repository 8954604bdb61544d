"""Goodfire: one torch file, `NAME-SAE-lLAYER.pt` or `.pth`. ReLU, residual stream after the layer, no input bias.

Weights `encoder_linear.weight` (d_sae, d_model), `encoder_linear.bias`, `decoder_linear.weight` (d_model, d_sae),
`decoder_linear.bias`.
"""

from __future__ import annotations

from pathlib import Path

from saeguard.sae.autoencoder import ReLU, SparseAutoencoder
from saeguard.sae.formats.place import Origin, Place, layer_in
from saeguard.sae.tensors import read_tensors


def find(place: Place) -> Path | None:
    """A file named as theirs are."""
    return place.file("*-SAE-l*.pt", "*-SAE-l*.pth")


def read(path: Path, origin: Origin) -> SparseAutoencoder:
    """ReLU as it is stored."""
    names = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
    W_enc, b_enc, W_dec, b_dec = (tensor.T if tensor.dim() == 2 else tensor
                                  for tensor in map(read_tensors(path, names).__getitem__, names))  # fmt: skip
    name = path.stem.partition("-SAE-")[0]
    return SparseAutoencoder(
        W_enc, b_enc, W_dec, b_dec, ReLU(), source=origin.source,
        metadata={"model_name": f"meta-llama/{name}", "layer": layer_in(path.stem), "hook": "resid_post"},
    )  # fmt: skip
