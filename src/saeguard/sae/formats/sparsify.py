"""EleutherAI sparsify (eai-sparsify): `cfg.json` and `sae.safetensors`, TopK after a ReLU.

Weights `encoder.weight` (d_sae, d_model), `encoder.bias`, `W_dec` (d_sae, d_model, not transposed), `b_dec`, and with
a linear path `W_skip` (d_model, d_model), output first. The folder is named after a module: `layers.10`,
`layers.10.mlp`, `h.5`. An SAE reads its output less `b_dec`; a transcoder reads its input as it is, for its output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import SparseAutoencoder, TopK
from saeguard.sae.formats import fold
from saeguard.sae.formats.hookname import place
from saeguard.sae.formats.place import Origin, Place
from saeguard.sae.tensors import read_config, read_tensors


def find(place: Place) -> Path | None:
    """`sae.safetensors`."""
    return place.file("sae.safetensors")


def read(path: Path, origin: Origin) -> SparseAutoencoder:
    """TopK, the subtraction of `b_dec` folded into `b_enc`."""
    config = read_config(path.with_name("cfg.json"))
    if config.get("activation", "topk") != "topk" or config.get("signed"):
        raise SAEError.mismatch(
            f"kind of the SAE {origin.source}",
            found={key: config.get(key) for key in ("activation", "signed")},
            expected="activation topk, not signed", fix="Choose another SAE.",
        )  # fmt: skip
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    stored = read_tensors(path, names, ("W_skip",))
    skip = stored.get("W_skip")
    sae = SparseAutoencoder(
        W_enc=stored["encoder.weight"].T, b_enc=stored["encoder.bias"], W_dec=stored["W_dec"], b_dec=stored["b_dec"],
        activation=TopK(_k(config, origin.source)), source=origin.source,
        metadata=_metadata(path.parent.name, config), W_skip=None if skip is None else skip.T,
    )  # fmt: skip
    return sae if config.get("transcode") else fold.input_bias(sae)


def _metadata(point: str, config: dict[str, Any]) -> dict[str, Any]:
    return place(f"{point}.input", f"{point}.output") if config.get("transcode") else place(point)


def _k(config: dict[str, Any], source: str) -> int:
    k = config.get("k")
    if not isinstance(k, int) or k < 1:
        raise SAEError.mismatch(
            f"k in cfg.json of {source}", found=k, expected="a number from 1", fix="Fetch it again."
        )
    return k
