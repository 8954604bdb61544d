"""What `cfg.json` of any SAELens version says, in the words of version 6.

Version 6 keeps what it knows of the model under `metadata`; version 5 and before is flat, names the hook `hook_point`,
says TopK by `activation_fn_str` and scaling by a bool.
"""

from __future__ import annotations

from typing import Any

from saeguard.errors import SAEError
from saeguard.sae.formats.hookname import input_scaling, place
from saeguard.sae.formats.place import Origin
from saeguard.sae.scaling import InputScaling

RENAMED = {
    "hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}  # fmt: skip
SETTINGS = {
    "architecture", "d_in", "d_sae", "d_out", "dtype", "device", "k", "activation_fn", "activation_fn_kwargs",
    "apply_b_dec_to_input", "normalize_activations", "norm_scaling_factor", "reshape_activations",
    "rescale_acts_by_decoder_norm", "finetuning_scaling_factor", "model_from_pretrained_kwargs",
}  # fmt: skip
"""What is folded into the weights or goes without saying: all else describes the SAE."""
REFUSED = {
    "temporal": "its features depend on the tokens before, not on one token alone",
    "matching_pursuit": "its features are found one after the other, not by one linear encoder",
    "abstopk": "its features may be negative",
}
PER_TOKEN = {
    "layer_norm": InputScaling("layer_norm", 1e-5),
    "constant_norm_rescale": InputScaling("unit_norm", 1e-12),
}
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated", "batchtopk", "matryoshka_batchtopk", *TRANSCODERS)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of `cfg.json` in one level, by the names of version 6; those of `metadata` give way to others."""
    metadata = config.get("metadata")
    whole = {**(metadata if isinstance(metadata, dict) else {}), **config}
    return {RENAMED.get(key, key): value for key, value in whole.items() if key != "metadata"}


def architecture(config: dict[str, Any], where: str) -> str:
    """One of `ARCHITECTURES`. Raises `SAEError`, with the reason where there is one."""
    name = config.get("architecture") or "standard"
    activation = config.get("activation_fn") or "relu"
    if activation == "topk":
        name = "topk"
    if name not in ARCHITECTURES or activation not in ("relu", "topk"):
        raise SAEError.mismatch(
            f"architecture of the SAE in {where}",
            found=repr(name) if name not in ARCHITECTURES else f"the activation {activation!r}",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            fix=f"Choose another SAE{f': {REFUSED[name]}' if name in REFUSED else ''}.",
        )
    return str(name)


def check_form(config: dict[str, Any], where: str) -> None:
    """Raise `SAEError` for an SAE of one attention head, or of activations reshaped in another way than by head."""
    if config.get("hook_head_index") is not None:
        raise SAEError(
            f"the SAE in {where} reads head {config['hook_head_index']} alone. Choose one of all heads (hook_z) or of "
            "the residual stream."
        )
    if (shape := config.get("reshape_activations", "none")) not in ("none", "hook_z", None):
        raise SAEError.mismatch(
            f"reshape_activations of the SAE in {where}", found=repr(shape), expected="'none' or 'hook_z'",
            fix="Choose another SAE.",
        )  # fmt: skip


def scaling(config: dict[str, Any], origin: Origin, where: str) -> tuple[float | None, InputScaling | None]:
    """The factor of the inputs that can be folded, and the scaling that cannot. Raises `SAEError`."""
    value = config.get("normalize_activations")
    name = {"None": "none", "False": "none", "True": "expected_average_only_in"}.get(str(value), str(value))
    transcoder = config.get("architecture") in TRANSCODERS
    allowed: dict[str, InputScaling | None] = {"none": None} if transcoder else {"none": None, **PER_TOKEN}
    behind_norm = None
    if transcoder and (hook := config.get("hf_hook_name") or config.get("hook_name")):
        behind_norm = input_scaling(str(hook), str(config.get("model_name") or ""))
    if name in allowed:
        return None, allowed[name] or behind_norm
    if name != "expected_average_only_in":
        raise SAEError.mismatch(
            f"normalize_activations of the SAE in {where}", found=repr(name),
            expected=f"one of {', '.join((*allowed, 'expected_average_only_in'))}",
            fix="Whitening must be folded by SAELens before it is saved. Else choose another SAE.",
        )  # fmt: skip
    factor = origin.scale or config.get("norm_scaling_factor")
    if not isinstance(factor, float | int) or not 0 < factor < float("inf"):
        raise SAEError(
            f"the SAE in {where} scales its inputs ({name}) by a factor that its folder does not hold. If SAELens's "
            "registry has it, load the SAE by that name (saelens:RELEASE:ID). Else fold it into the weights with "
            "SAELens (fold_activation_norm_scaling_factor), save it with normalize_activations='none', and load that."
        )
    return float(factor), behind_norm


def described(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The SAE's metadata, with `layer` and `hook` (`hook_out` of a transcoder). Raises `SAEError`.

    A module path, where there is one, is taken before the TransformerLens name: `hook_mlp_in` is in use for two places.
    """
    metadata = {key: value for key, value in config.items() if key not in SETTINGS and value is not None}
    name, out = (str(config.get(f"hf_{key}") or config.get(key) or "") for key in ("hook_name", "hook_name_out"))
    if "hook" in config and "layer" in config:
        found: dict[str, Any] = {}
    elif name:
        found = place(name, out, str(config.get("model_name") or ""))
    else:
        found = {"layer": config.get("hook_layer", config.get("layer"))}
    layer = {**metadata, **found}.get("layer")
    if layer is not None and not str(layer).isdigit():
        raise SAEError(f"cfg.json in {where}: found the layer {layer!r}, expected a number")
    return {**metadata, **found}
