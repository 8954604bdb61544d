"""The SAELens folder format: `cfg.json` and `sae_weights.safetensors` (facts: versions 5 and 6).

Weights `W_enc` (d_in, d_sae), `W_dec` (d_sae, d_in), `b_enc`, `b_dec`, and `threshold` for JumpReLU.
`cfg.json` of version 6 keeps what it knows of the model under `metadata`; version 5 is flat.
What a plain linear encoder cannot express (per-token norms, gates) is refused, never guessed.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saeguard.errors import SAEError
from saeguard.files import follow_umask
from saeguard.sae.autoencoder import Activation, JumpReLU, ReLU, SparseAutoencoder, TopK
from saeguard.sae.formats.place import Place, layer_in
from saeguard.sae.tensors import read_config, read_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

HOOKS = {"hook_z": "attn_z", "hook_attn_out": "attn_out"}


def find(place: Place) -> Path | None:
    """`sae_weights.safetensors` beside `cfg.json`."""
    path = place.file(WEIGHTS)
    return path if path and path.with_name(CONFIG).is_file() else None


def read(path: Path, source: str) -> SparseAutoencoder:
    """A ReLU, JumpReLU or TopK SAE in plain units. Raises `SAEError`."""
    folder = path.parent
    config = read_config(folder / CONFIG)
    weights = read_tensors(path, ("W_enc", "b_enc", "W_dec", "b_dec"), ("threshold",))
    normalisation = config.get("normalize_activations", "none")
    if normalisation not in ("none", False, None):
        raise SAEError(
            f"the SAE in {folder} scales its inputs ({normalisation!r}), with a factor its folder does not "
            "hold. Fold the scaling into the weights with SAELens (fold_activation_norm_scaling_factor), "
            "save it again with normalize_activations='none', and load that."
        )
    tensors = {name: weights[name].contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    activation = _activation(config, weights, folder)
    return _fold(
        SparseAutoencoder(**tensors, activation=activation, source=source, metadata=_metadata(config, folder)),
        config,
    )


def save_saelens(sae: SparseAutoencoder, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write an SAE as SAELens 6 reads it (`SAE.load_from_disk`); `b_dec` is not subtracted at the input."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    config: dict[str, Any] = {
        "architecture": {ReLU: "standard", JumpReLU: "jumprelu", TopK: "topk"}[type(sae.activation)],
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", **sae.metadata},
    }
    if isinstance(sae.activation, JumpReLU):
        weights["threshold"] = sae.activation.threshold
    if isinstance(sae.activation, TopK):
        config |= {"k": sae.activation.k, "rescale_acts_by_decoder_norm": False}
    small = {name for name in weights if name.startswith("b_") or name == "threshold"}
    save_file(
        {
            name: tensor.cpu().to(torch.float32 if name in small else dtype).contiguous()
            for name, tensor in weights.items()
        },
        folder / WEIGHTS,
    )
    follow_umask(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _activation(config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> Activation:
    name = config.get("architecture", "standard")
    if config.get("activation_fn_str", config.get("activation_fn")) == "topk":
        name = "topk"
    if name == "jumprelu":
        if "threshold" not in weights:
            raise SAEError(f"{folder / WEIGHTS} is a JumpReLU SAE without `threshold`")
        return JumpReLU(weights["threshold"])
    if name == "topk":
        k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
        if not isinstance(k, int) or k < 1:
            raise SAEError(f"{folder / CONFIG} is a TopK SAE without a usable k (found {k!r})")
        return TopK(k)
    if name == "standard":
        return ReLU()
    raise SAEError.mismatch(
        f"architecture of the SAE in {folder}",
        found=repr(name),
        expected="'standard', 'jumprelu' or 'topk'",
        fix="Convert it, or choose another SAE.",
    )


def _fold(sae: SparseAutoencoder, config: dict[str, Any]) -> SparseAutoencoder:
    """Fold the input bias and decoder-norm units into the encoder, so that pre = h @ W_enc + b_enc."""
    W_enc, b_enc, W_dec = sae.W_enc, sae.b_enc, sae.W_dec
    if config.get("apply_b_dec_to_input", True):
        b_enc = b_enc - sae.b_dec @ W_enc
    if isinstance(sae.activation, TopK) and config.get("rescale_acts_by_decoder_norm", False):
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    return replace(sae, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec)


def _metadata(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the file says, with `layer` and `hook`; the stream before a layer is that after the one before."""
    metadata: dict[str, Any] = config.get("metadata") or {
        k: config[k] for k in ("model_name", "hook_name") if k in config
    }
    layer = config.get("hook_layer", metadata.get("layer"))
    if layer is None:
        layer = layer_in(str(metadata.get("hook_name", "")))
    if layer is None:
        return metadata
    site = str(metadata.get("hook_name", "")).rpartition(".")[2]
    hook = HOOKS.get(site, site.removeprefix("hook_")) or "resid_post"
    try:
        before = int(site == "hook_resid_pre" and int(layer) > 0)
        return {**metadata, "layer": int(layer) - before, "hook": "resid_post" if before else hook}
    except (TypeError, ValueError) as error:
        raise SAEError(f"{folder / CONFIG}: found the layer {layer!r}, expected a number") from error
