"""The places in a decoder block at which an SAE may be trained, as ports of the block's modules.

    resid_pre   what goes into the block                    attn_out   what the attention adds to the residual stream
    attn_z      what goes into the attention's projection   mlp_out    what the MLP adds to the residual stream
    resid_mid   what goes into the norm before the MLP      resid_post what leaves the block
    mlp_in      what goes into the MLP

The parts are found by what families call them; where a norm follows attention or MLP (Gemma 2 and 3, OLMo 2, GLM 4),
what they add leaves that norm. In blocks whose attention and MLP run side by side `resid_mid` is what the MLP's norm
reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from saeguard.choices import Hook
from saeguard.errors import HookError
from saeguard.hooks import Port

ATTENTION = ("self_attn", "self_attention", "attention", "attn", "linear_attn", "mixer")
PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo")
MLP = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe")
NORM_AFTER_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
NORM_BEFORE_MLP = ("pre_feedforward_layernorm", "ln_2", "ln_mlp", "post_attention_layernorm", "final_layer_norm")
NORM_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm")

DESCRIPTIONS: dict[Hook, str] = {
    "resid_pre": "the residual stream before the block",
    "attn_z": "the attention heads' outputs before their projection",
    "attn_out": "what the attention adds to the residual stream",
    "resid_mid": "the residual stream between attention and MLP",
    "mlp_in": "what goes into the MLP",
    "mlp_out": "what the MLP adds to the residual stream",
    "resid_post": "the residual stream after the block",
}


@dataclass(frozen=True)
class HookPoint:
    """A place in a model: the block `layer`, counted from 0, and the place in it."""

    layer: int
    hook: Hook = "resid_post"

    def __str__(self) -> str:
        return f"{DESCRIPTIONS[self.hook]} (layer {self.layer})"


def port_in(block: nn.Module, hook: Hook) -> Port:
    """Where the values of a place pass in this block. Raises `HookError` where the block has no such part."""
    if hook == "resid_pre":
        return Port(block, "input")
    if hook == "resid_post":
        return Port(block, "output")
    if hook == "attn_z":
        return Port(_part(_part(block, ATTENTION, hook), PROJECTION, hook), "input")
    if hook == "attn_out":
        return Port(_part(block, NORM_AFTER_ATTENTION if _norm_follows(block) else ATTENTION, hook), "output")
    if hook == "mlp_out":
        return Port(_part(block, NORM_AFTER_MLP if _norm_follows(block) else (*MLP, "fc2"), hook), "output")
    if hook == "resid_mid" and not (_norm_follows(block) and not hasattr(block, NORM_BEFORE_MLP[0])):
        return Port(_part(block, NORM_BEFORE_MLP, hook), "input")
    return Port(_part(block, (*MLP, "fc1"), hook), "input")


def width_at(port: Port, hidden_size: int) -> int:
    """The last dimension of what passes a port: `hidden_size`, but for the input of the attention's projection."""
    width = getattr(port.module, "in_features", None) or getattr(port.module, "nx", None)
    return int(width) if port.side == "input" and width else hidden_size


def _norm_follows(block: nn.Module) -> bool:
    return any(hasattr(block, name) for name in NORM_AFTER_MLP)


def _part(module: nn.Module, names: Sequence[str], hook: Hook) -> nn.Module:
    for name in names:
        if isinstance(part := getattr(module, name, None), nn.Module):
            if "residual" in inspect.signature(type(part).forward).parameters:
                raise HookError(
                    f"{name} of {type(module).__name__} adds the residual stream itself, so that {hook} cannot be told "
                    "from it. Use an SAE of the residual stream."
                )
            return part
    raise HookError.mismatch(
        f"parts of {type(module).__name__}, for the hook point {hook}",
        found=[name for name, _ in module.named_children()],
        expected=f"one of {', '.join(names)}",
        fix="Use an SAE of the residual stream.",
    )
