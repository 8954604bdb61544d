"""EleutherAI sparsify (eai-sparsify): `cfg.json` and `sae.safetensors`, TopK after a ReLU.

Weights `encoder.weight` (d_sae, d_model), `encoder.bias`, `W_dec` (d_sae, d_model, not transposed), `b_dec`.
`b_dec` is subtracted at the input. The folder is named after the module whose output was read: `layers.10`,
`layers.10.mlp`, `h.5`.
"""

from __future__ import annotations

from pathlib import Path

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import SparseAutoencoder, TopK
from saeguard.sae.formats.place import Place, layer_in
from saeguard.sae.tensors import read_config, read_tensors


def find(place: Place) -> Path | None:
    """`sae.safetensors`."""
    return place.file("sae.safetensors")


def read(path: Path, source: str) -> SparseAutoencoder:
    """TopK, the subtraction of `b_dec` folded into `b_enc`."""
    config = read_config(path.with_name("cfg.json"))
    if config.get("activation", "topk") != "topk" or config.get("transcode") or config.get("signed"):
        raise SAEError.mismatch(
            f"kind of the SAE {source}",
            found={key: config.get(key) for key in ("activation", "transcode", "signed")},
            expected="activation topk, neither transcode nor signed",
            fix="Choose another SAE.",
        )
    stored = read_tensors(path, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    W_enc = stored["encoder.weight"].T.contiguous()
    point = path.parent.name
    tail = point.rpartition(".")[2]
    return SparseAutoencoder(
        W_enc=W_enc, b_enc=stored["encoder.bias"] - stored["b_dec"] @ W_enc,
        W_dec=stored["W_dec"], b_dec=stored["b_dec"], activation=TopK(_k(config, source)), source=source,
        metadata={
            "layer": layer_in(point), "hook_name": point,
            "hook": "resid_post" if tail.isdigit() else {"mlp": "mlp_out"}.get(tail, tail),
        },
    )  # fmt: skip


def _k(config: dict[str, object], source: str) -> int:
    k = config.get("k")
    if not isinstance(k, int) or k < 1:
        raise SAEError.mismatch(
            f"k in cfg.json of {source}", found=k, expected="a number from 1", fix="Fetch it again."
        )
    return k
