"""Where in a model an SAE reads and writes, from the names people give places: TransformerLens hooks and module paths.

    blocks.3.hook_resid_post   blocks.3.attn.hook_z   blocks.3.mlp.hook_in          TransformerLens
    model.layers.3.output      model.layers.3.self_attn.o_proj.input                a module's input or output
    layers.3.mlp               transformer.h.3        resid_post_layer_3            its output, where neither is said

TransformerLens's `hook_mlp_in` is the residual stream before the norm, `mlp.hook_in` the normalised values that enter
the MLP. Models that put norms on both sides of a sublayer (Gemma 2 and 3) call other things by the same module names.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from saeguard.choices import Hook
from saeguard.errors import SAEError
from saeguard.sae.scaling import InputScaling

BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers|layer|h)\.(\d+)(?:\.(.*))?$")
NAMED = re.compile(r"(resid_pre|resid_mid|resid_post|mlp_in|mlp_out|mlp|attention_out|attn_out|attn)_layer_?(\d+)")
SANDWICH = re.compile(r"gemma-?[23]")
RMS_EPS = {"gemma": 1e-6, "qwen": 1e-6, "llama": 1e-5, "mistral": 1e-5, "smollm": 1e-5}

TRANSFORMER_LENS: dict[str, Hook] = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_mlp_in": "resid_mid", "mlp.hook_in": "mlp_in", "ln2.hook_out": "mlp_in",
    "hook_mlp_out": "mlp_out", "mlp.hook_out": "mlp_out",
    "attn.hook_z": "attn_z", "hook_z": "attn_z", "hook_attn_out": "attn_out", "attn.hook_out": "attn_out",
}  # fmt: skip
NORMALISED = "ln2.hook_normalized"

PROJECTIONS = ("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.c_proj", "attention.dense")
ATTENTIONS = ("self_attn", "attn", "attention", "self_attention")
MLPS = ("mlp", "block_sparse_moe", "feed_forward")
MODULES: dict[str, Hook] = {
    "input": "resid_pre", "output": "resid_post",
    "input_layernorm.input": "resid_pre", "ln_1.input": "resid_pre",
    "post_attention_layernorm.input": "resid_mid", "post_attention_layernorm.output": "mlp_in",
    "ln_2.input": "resid_mid", "ln_2.output": "mlp_in",
    **{f"{name}.input": "attn_z" for name in PROJECTIONS},
    **{f"{name}.output": "attn_out" for name in (*PROJECTIONS, *ATTENTIONS)},
    **{f"{name}.input": "mlp_in" for name in MLPS},
    **{f"{name}.output": "mlp_out" for name in MLPS},
}  # fmt: skip
MODULES_OF_SANDWICH: dict[str, Hook] = {
    "input": "resid_pre", "output": "resid_post", "input_layernorm.input": "resid_pre",
    "self_attn.o_proj.input": "attn_z", "post_attention_layernorm.output": "attn_out",
    "pre_feedforward_layernorm.input": "resid_mid", "pre_feedforward_layernorm.output": "mlp_in",
    "mlp.input": "mlp_in", "post_feedforward_layernorm.output": "mlp_out",
}  # fmt: skip
PARTS = {
    "resid_pre": "input", "resid_mid": "hook_resid_mid", "resid_post": "output", "mlp_in": "mlp.input",
    "mlp_out": "mlp", "mlp": "mlp", "attention_out": "self_attn", "attn_out": "self_attn", "attn": "self_attn",
}  # fmt: skip


class Site(NamedTuple):
    """A place in a block; `normalised`: not its values, but those after the model's norm, before the norm's weight."""

    layer: int
    hook: Hook
    normalised: bool = False


def site(name: str, model: str = "") -> Site:
    """The place a name means in a model, as far as the model is known. Raises `SAEError`."""
    if named := NAMED.fullmatch(name):
        name = f"layers.{named[2]}.{PARTS[named[1]]}"
    block = BLOCK.search(name)
    if block is None:
        raise _unknown(name, "a place in a block, such as blocks.3.hook_resid_post or model.layers.3.output")
    layer, part = int(block[1]), block[2] or "output"
    if part == NORMALISED:
        return Site(layer, "resid_mid", normalised=True)
    if part in TRANSFORMER_LENS:
        return Site(layer, TRANSFORMER_LENS[part])
    sandwich = "_feedforward_layernorm" in part or SANDWICH.search(model.lower())
    modules = MODULES_OF_SANDWICH if sandwich else MODULES
    for wanted in (part, f"{part}.output"):
        if wanted in modules:
            return Site(layer, modules[wanted])
    raise _unknown(name, f"one of {', '.join([*TRANSFORMER_LENS, NORMALISED, *modules])} in a block")


def place(name: str, out: str = "", model: str = "") -> dict[str, Any]:
    """`layer`, `hook` and the names themselves, for the metadata of an SAE; of a transcoder `hook_out` too.

    The residual stream before a layer, read and written there, is that after the layer before it. Raises `SAEError`.
    """
    into, onto = site(name, model), site(out or name, model)
    metadata: dict[str, Any] = {"layer": into.layer, "hook": into.hook, "hook_name": name}
    if model:
        metadata["model_name"] = model
    if onto == into and not into.normalised:
        before = into.hook == "resid_pre" and into.layer > 0
        return metadata | ({"layer": into.layer - 1, "hook": "resid_post"} if before else {})
    if onto.layer != into.layer or onto.normalised:
        raise SAEError.mismatch(
            f"where the values go that are read at {name}", found=onto, expected=f"a place of layer {into.layer} "
            "that is not normalised", fix="Cross-layer transcoders and SAEs of normalised values are not supported.",
        )  # fmt: skip
    return metadata | {"hook_out": onto.hook, "hook_name_out": out}


def input_scaling(name: str, model: str) -> InputScaling | None:
    """The scaling that stands for the model's norm, where a transcoder reads what it gives. Raises `SAEError`."""
    if not site(name, model).normalised:
        return None
    for family, eps in RMS_EPS.items():
        if family in model.lower():
            return InputScaling("rms", eps)
    raise SAEError.mismatch(
        f"model of a transcoder that reads {name}", found=model or "none",
        expected=f"one whose norm is the root mean square, of the families {', '.join(RMS_EPS)}",
        fix="Choose another SAE.",
    )  # fmt: skip


def _unknown(name: str, expected: str) -> SAEError:
    return SAEError.mismatch(
        "hook point of the SAE", found=repr(name), expected=expected,
        fix="Choose an SAE of another place, or correct the name in its configuration.",
    )  # fmt: skip
