"""OpenMOSS: `config.json` and `sae_weights.safetensors`, of llamascopium 2 and of lm_saes (Llama Scope R1-distill).

    today     W_E (d_model, d_sae), b_E, W_D (d_sae, d_model), b_D, activation_function.log_jumprelu_threshold (d_sae)
    before    encoder.weight (d_sae, d_model), encoder.bias, decoder.weight (d_model, d_sae), decoder.bias,
              log_jumprelu_threshold

`norm_activation`: `dataset-wise` scales by s = sqrt(d_model) / dataset_average_activation_norm, a number in the file
for each hook point; `inference` has that folded in; `token-wise` scales each token to norm sqrt(d_model).
`sparsity_include_decoder_norm`: what is active is decided on pre-activations times the norms of the decoder rows.
`batchtopk` keeps no threshold, so that it is read as TopK, which it is for a batch of one token.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import Activation, JumpReLU, ReLU, SparseAutoencoder, TopK
from saeguard.sae.formats import fold
from saeguard.sae.formats.hookname import input_scaling, place
from saeguard.sae.formats.place import Origin, Place
from saeguard.sae.scaling import InputScaling
from saeguard.sae.tensors import read_config, read_tensors, tensor_names

NORM = "dataset_average_activation_norm."
KEYS = {
    "W_enc": ("W_E", "encoder.weight"), "b_enc": ("b_E", "encoder.bias"),
    "W_dec": ("W_D", "decoder.weight"), "b_dec": ("b_D", "decoder.bias"),
    "log_threshold": ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold"),
}  # fmt: skip


def find(place: Place) -> Path | None:
    """`sae_weights.safetensors` beside `config.json`; or a checkpoint of theirs that cannot be read, to say so."""
    path = place.file("sae_weights.safetensors", "sae_weights.dcp", "sae_weights.pt")
    return path if path and path.with_name("config.json").is_file() else None


def read(path: Path, origin: Origin) -> SparseAutoencoder:
    """ReLU, JumpReLU, TopK and BatchTopK, in plain units. Raises `SAEError`."""
    config = read_config(path.with_name("config.json"))
    _check(config, path, origin)
    weights, norms = _weights(path, config)
    hook, out = (str(config.get(f"hook_point_{side}") or "") for side in ("in", "out"))
    model = str(config.get("model_name") or ("meta-llama/Llama-3.1-8B" if "Llama-Scope-R1" in origin.address else ""))
    sae = SparseAutoencoder(
        **{name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
        activation=_activation(config, weights, origin), source=origin.source,
        metadata=place(hook, out, model), scaling=_scaling(config, hook, model),
    )  # fmt: skip
    if config.get("apply_decoder_bias_to_pre_encoder"):
        sae = fold.input_bias(sae)
    if config.get("sparsity_include_decoder_norm", True):
        sae = _by_decoder_norm(sae)
    if config.get("norm_activation", "dataset-wise") != "dataset-wise":
        return sae
    into, onto = (_factor(norms, point, sae.d_model, origin) for point in (hook, out or hook))
    return fold.input_scale(sae, into, onto)


def _check(config: dict[str, Any], path: Path, origin: Origin) -> None:
    if path.suffix != ".safetensors":
        raise SAEError(
            f"{path} is a checkpoint of a training. Load it with llamascopium on one device "
            "(SparseAutoEncoder.from_local) and save it again (save_pretrained), as sae_weights.safetensors."
        )
    expected = {
        "sae_type": ("sae",), "use_glu_encoder": (False,), "act_fn": ("relu", "jumprelu", "topk", "batchtopk"),
        "norm_activation": ("dataset-wise", "inference", "token-wise"),
    }  # fmt: skip
    reasons = {
        "sae_type": "Crosscoders and cross-layer transcoders write to several layers, and a guardrail acts on one",
        "use_glu_encoder": "A gated linear unit in the encoder is not linear in the input",
        "norm_activation": "A scaling that depends on the batch cannot be served",
    }
    for key, values in expected.items():
        if config.get(key, values[0]) not in values:
            raise SAEError.mismatch(
                f"{key} of {origin.source}", found=repr(config[key]), expected=f"one of {values}",
                fix=f"{reasons.get(key, 'Not supported')}: choose another SAE.",
            )  # fmt: skip


def _weights(path: Path, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights by our names, in our layout, and the norms by hook point."""
    present = tensor_names(path)
    before = "encoder.weight" in present
    named = {ours: theirs[before] for ours, theirs in KEYS.items()}
    if config.get("act_fn", "relu") != "jumprelu":
        named.pop("log_threshold")
    if not config.get("use_decoder_bias", True):
        named.pop("b_dec")
    stored = read_tensors(path, named.values(), [name for name in present if name.startswith(NORM)])
    weights = {ours: stored[theirs] for ours, theirs in named.items()}
    if before:
        weights |= {name: weights[name].T for name in ("W_enc", "W_dec")}
    weights.setdefault("b_dec", weights["W_dec"].new_zeros(weights["W_dec"].shape[-1]))
    return weights, {name.removeprefix(NORM): tensor for name, tensor in stored.items() if name.startswith(NORM)}


def _activation(config: dict[str, Any], weights: dict[str, Tensor], origin: Origin) -> Activation:
    if "log_threshold" in weights:
        return JumpReLU(weights["log_threshold"].exp())
    if config.get("act_fn", "relu") == "relu":
        return ReLU()
    k = config.get("top_k")
    if not isinstance(k, int) or k < 1:
        raise SAEError.mismatch(f"top_k of {origin.source}", found=k, expected="a number from 1", fix="Fetch it again.")
    return TopK(k)


def _scaling(config: dict[str, Any], hook: str, model: str) -> InputScaling | None:
    if config.get("norm_activation") != "token-wise":
        return input_scaling(hook, model)
    if config.get("hook_point_out", hook) != hook:
        raise SAEError("a transcoder whose input and output are scaled token by token cannot be read. Choose another.")
    return InputScaling("unit_norm", 1e-12)


def _by_decoder_norm(sae: SparseAutoencoder) -> SparseAutoencoder:
    """TopK ranks by pre-activation times norm; the others compare it with a threshold, which can be divided instead."""
    if isinstance(sae.activation, TopK):
        return fold.decoder_norms(sae)
    if isinstance(sae.activation, JumpReLU):
        norm = sae.W_dec.norm(dim=1).clamp(min=fold.SMALLEST_NORM)
        return replace(sae, activation=JumpReLU(sae.activation.threshold / norm))
    return sae


def _factor(norms: dict[str, Tensor], point: str, d_model: int, origin: Origin) -> float:
    """What the values at a hook point are multiplied by. Raises `SAEError`."""
    norm = float(norms[point]) if point in norms and norms[point].dim() == 0 else 0.0
    if norm > 0:
        return float(d_model**0.5 / norm)
    if origin.scale:
        return origin.scale
    raise SAEError.mismatch(
        f"{NORM}{point} of {origin.source}", found=norms.get(point, "no such tensor"), expected="a positive number",
        fix="It scales the inputs. Use the SAE as it was published, or by its name in SAELens (saelens:RELEASE:ID).",
    )  # fmt: skip
