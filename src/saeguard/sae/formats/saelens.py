"""The SAELens folder format: `cfg.json` and `sae_weights.safetensors`, of versions 4 to 6.

    pre = (x s - [b_dec]) W_enc + b_enc          x' = (a W_dec + b_dec) / s

Weights `W_enc` (d_in, d_sae), `W_dec` (d_sae, d_out), `b_enc`, `b_dec`; `threshold` for JumpReLU; `b_gate`, `b_mag` and
`r_mag` in the place of `b_enc` for gated; `topk_threshold` for BatchTopK not yet saved for inference; `W_skip`
(d_out, d_in). s is a number (`expected_average_only_in`), which the folder does not hold, or taken token by token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saeguard.errors import SAEError
from saeguard.files import follow_umask
from saeguard.sae.autoencoder import Activation, JumpReLU, ReLU, SparseAutoencoder, TopK
from saeguard.sae.formats import fold, saelens_config
from saeguard.sae.formats.place import Origin, Place
from saeguard.sae.tensors import read_config, read_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
BATCHED = ("batchtopk", "matryoshka_batchtopk")
NEEDED = {
    "gated": ("b_gate", "b_mag", "r_mag"),
    **{kind: ("b_enc", "topk_threshold") for kind in BATCHED},
    **{kind: ("b_enc", "threshold") for kind in ("jumprelu", "jumprelu_transcoder")},
    "jumprelu_skip_transcoder": ("b_enc", "threshold", "W_skip"), "skip_transcoder": ("b_enc", "W_skip"),
}  # fmt: skip


def find(place: Place) -> Path | None:
    """`sae_weights.safetensors` beside `cfg.json`."""
    path = place.file(WEIGHTS)
    return path if path and path.with_name(CONFIG).is_file() else None


def read(path: Path, origin: Origin) -> SparseAutoencoder:
    """Any of `saelens_config.ARCHITECTURES`, in plain units. Raises `SAEError`."""
    where = str(path.parent)
    config = saelens_config.flat(read_config(path.with_name(CONFIG))) | dict(origin.overrides)
    kind = saelens_config.architecture(config, where)
    saelens_config.check_form(config, where)
    metadata = saelens_config.described(config, where)
    factor, scaling = saelens_config.scaling(config, origin, where)
    needed = ("W_enc", "W_dec", "b_dec", *NEEDED.get(kind, ("b_enc",)))
    weights = read_tensors(path, needed, ("W_skip", "scaling_factor"))
    skip = weights.get("W_skip")
    sae = SparseAutoencoder(
        W_enc=weights["W_enc"], b_enc=weights["b_mag" if kind == "gated" else "b_enc"], W_dec=weights["W_dec"],
        b_dec=weights["b_dec"], activation=_activation(kind, config, weights, path), source=origin.source,
        metadata=metadata, W_skip=None if skip is None else skip.T, scaling=scaling,
    )  # fmt: skip
    if kind == "gated":
        sae = fold.gate(sae, weights["r_mag"])
    if config.get("apply_b_dec_to_input", True) and kind not in saelens_config.TRANSCODERS:
        sae = fold.input_bias(sae)
    if config.get("rescale_acts_by_decoder_norm", False) and kind in ("topk", *BATCHED):
        sae = fold.decoder_norms(sae)
    if "scaling_factor" in weights:
        _finetune(sae, weights["scaling_factor"], bool(config.get("finetuning_scaling_factor")))
    return sae if factor is None else fold.input_scale(sae, factor, factor)


def save_saelens(sae: SparseAutoencoder, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write an SAE as SAELens 6 reads it (`SAE.load_from_disk`); `b_dec` is not subtracted at the input.

    Raises `SAEError` for transcoders, linear paths and scaled tokens.
    """
    if sae.transcodes or sae.W_skip is not None or sae.scaling is not None:
        raise SAEError(f"{sae.source} cannot be written: it is a transcoder, has a linear path or scales each token.")
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


def _activation(kind: str, config: dict[str, Any], weights: Mapping[str, Tensor], path: Path) -> Activation:
    """Of gated SAEs the gate's bias stands for the threshold, until it is folded."""
    if kind == "gated":
        return JumpReLU(weights["b_gate"])
    if "jumprelu" in kind:
        return JumpReLU(weights["threshold"])
    if kind in BATCHED:
        return JumpReLU(weights["topk_threshold"].expand(weights["b_enc"].shape).contiguous())
    if kind != "topk":
        return ReLU()
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if not isinstance(k, int) or k < 1:
        raise SAEError(f"{path.with_name(CONFIG)} is a TopK SAE without a usable k (found {k!r})")
    return TopK(k)


def _finetune(sae: SparseAutoencoder, factor: Tensor, wanted: bool) -> None:
    """Version 5 multiplied each activation by a tuned factor (d_sae,) before decoding, or stored ones."""
    if bool((factor == 1).all()):
        return
    if not wanted or factor.shape != sae.b_enc.shape:
        raise SAEError.mismatch(
            f"scaling_factor of the SAE {sae.source}", found=f"a tensor {tuple(factor.shape)} that is not all ones, "
            f"with finetuning_scaling_factor {wanted}", expected=f"{tuple(sae.b_enc.shape)} and True, or all ones",
            fix="Fetch the SAE again.",
        )  # fmt: skip
    sae.W_dec.mul_(factor[:, None])
