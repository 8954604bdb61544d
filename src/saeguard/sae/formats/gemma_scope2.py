"""Gemma Scope 2 (google/gemma-scope-2-{270m,1b,4b,12b,27b}-{pt,it}): `params.safetensors`, JumpReLU, no input bias.

Weights `w_enc` (d_model, d_sae), `w_dec` (d_sae, d_model), `b_enc`, `b_dec`, `threshold`, and where a linear path runs
beside the features `affine_skip_connection` (d_model, d_model). `config.json` names the hook points, where it is there.
"""

from __future__ import annotations

from pathlib import Path

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder
from saeguard.sae.formats.place import Place, layer_in
from saeguard.sae.tensors import read_config, read_tensors

KINDS = {
    "resid_post": "resid_post",
    "mlp_out": "mlp_out",
    "attn_out": "attn_z",
    "transcoder": "transcoder",
    "clt": "clt",
}


def find(place: Place) -> Path | None:
    """`params.safetensors`."""
    return place.file("params.safetensors")


def read(path: Path, source: str) -> SparseAutoencoder:
    """JumpReLU as it is stored; with an affine path, `W_skip`."""
    config = read_config(path.with_name("config.json")) if path.with_name("config.json").is_file() else {}
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise SAEError.mismatch(
            f"architecture of {source}", found=architecture, expected="jump_relu", fix="Choose another SAE."
        )
    stored = read_tensors(path, ("w_enc", "w_dec", "b_enc", "b_dec", "threshold"), ("affine_skip_connection",))
    kinds = [kind for part in Path(source).parts for name, kind in KINDS.items() if part.removesuffix("_all") == name]
    point = str(config.get("hf_hook_point_in", ""))
    metadata = {
        "layer": layer_in(point) if point else layer_in(source),
        "hook": kinds[-1] if kinds else _kind(point),
        "hook_name": point,
        "model_name": config.get("model_name"),
    }
    return SparseAutoencoder(
        W_enc=stored["w_enc"], b_enc=stored["b_enc"], W_dec=stored["w_dec"], b_dec=stored["b_dec"],
        activation=JumpReLU(stored["threshold"]), W_skip=stored.get("affine_skip_connection"),
        source=source, metadata=metadata,
    )  # fmt: skip


def _kind(point: str) -> str:
    """The hook of `model.layers.3.self_attn.o_proj.input` and the like."""
    for part, kind in (("o_proj", "attn_z"), ("post_feedforward", "mlp_out"), ("pre_feedforward", "transcoder")):
        if part in point:
            return kind
    return "resid_post"
