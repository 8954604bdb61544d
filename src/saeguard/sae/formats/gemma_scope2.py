"""Gemma Scope 2 (google/gemma-scope-2-{270m,1b,4b,12b,27b}-{pt,it}): `params.safetensors`, JumpReLU, no input bias.

Weights `w_enc` (d_model, d_sae), `w_dec` (d_sae, d_out), `b_enc`, `b_dec`, `threshold`, and where a linear path runs
beside the features `affine_skip_connection` (d_model, d_out). `config.json` names the hook points, where it is there;
else the folder does: `{resid_post,attn_out,mlp_out,transcoder}[_all]/layer_L_...`. Cross-layer transcoders (`clt`)
write to every later layer, and are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder
from saeguard.sae.formats.hookname import place
from saeguard.sae.formats.place import Origin, Place, layer_in
from saeguard.sae.tensors import read_config, read_tensors

BEFORE_MLP, AFTER_MLP = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
POINTS = {
    "resid_post": ("output", ""), "mlp_out": (AFTER_MLP, ""), "attn_out": ("self_attn.o_proj.input", ""),
    "transcoder": (BEFORE_MLP, AFTER_MLP),
}  # fmt: skip


def find(place: Place) -> Path | None:
    """`params.safetensors`, or a file of a cross-layer transcoder that was named."""
    return place.file("params.safetensors") or (place.file("clt*/*.safetensors") if place.named else None)


def read(path: Path, origin: Origin) -> SparseAutoencoder:
    """JumpReLU as it is stored; with an affine path, `W_skip`."""
    beside = path.with_name("config.json")
    config = read_config(beside) if beside.is_file() else {}
    architecture = config.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise SAEError.mismatch(
            f"architecture of {origin.source}", found=architecture, expected="jump_relu", fix="Choose another SAE."
        )
    stored = read_tensors(path, ("w_enc", "w_dec", "b_enc", "b_dec", "threshold"), ("affine_skip_connection",))
    if stored["w_dec"].dim() == 3:
        raise SAEError(
            f"{origin.source} is a cross-layer transcoder: each feature writes to {stored['w_dec'].shape[1]} layers, "
            "and a guardrail acts on one. Choose an SAE or a transcoder of one layer."
        )
    return SparseAutoencoder(
        W_enc=stored["w_enc"], b_enc=stored["b_enc"], W_dec=stored["w_dec"], b_dec=stored["b_dec"],
        activation=JumpReLU(stored["threshold"]), W_skip=stored.get("affine_skip_connection"),
        source=origin.source, metadata=_metadata(config, origin),
    )  # fmt: skip


def _metadata(config: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """From the configuration, else from the folders' names. The model is of the Gemma 3 family in any case."""
    point, out = (str(config.get(f"hf_hook_point_{side}") or "") for side in ("in", "out"))
    layer = layer_in(origin.address)
    kinds = [kind for part in Path(origin.address).parts if (kind := part.removesuffix("_all")) in POINTS]
    if not point and kinds and layer is not None:
        point, out = (f"model.layers.{layer}.{name}" if name else "" for name in POINTS[kinds[-1]])
    if not point:
        return {"layer": layer, "hook": "resid_post", "model_name": config.get("model_name")}
    return place(point, out, str(config.get("model_name") or "gemma-3"))
