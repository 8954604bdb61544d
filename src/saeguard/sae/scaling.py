"""Scaling of an SAE's input token by token, which cannot be folded into its weights.

    kind         what is encoded                       the SAE's output is
    layer_norm   (x - mean) / (std + eps)              times std, plus mean
    unit_norm    x sqrt(d) / |x|                       times |x| / sqrt(d)
    rms          x / sqrt(mean of x^2 + eps)           left as it is

mean and std (of a sample: over d - 1) are over the d numbers of a token. `layer_norm` and `unit_norm` are SAELens's
`layer_norm` and `constant_norm_rescale`. `rms` is the model's own norm before its weight, where a transcoder reads it.

Activations are in plain units: where the output is scaled back by u, a = u a', so that decoding stays linear in a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


class Scaled(NamedTuple):
    """What is encoded (tokens, d_model); the unit u of its activations and the mean that was taken out (tokens, 1)."""

    x: Tensor
    unit: Tensor
    mean: Tensor


@dataclass(frozen=True)
class InputScaling:
    """How the input is scaled; `eps` keeps tokens of all zeros finite."""

    kind: Literal["layer_norm", "unit_norm", "rms"]
    eps: float

    def __call__(self, x: Tensor) -> Scaled:
        """Scale values (tokens, d_model) in float32."""
        none = x.new_zeros(len(x), 1)
        if self.kind == "layer_norm":
            mean, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
            return Scaled((x - mean) / (std + self.eps), std, mean)
        if self.kind == "unit_norm":
            unit = (x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5).clamp(min=self.eps)
            return Scaled(x / unit, unit, none)
        return Scaled(x * (x.pow(2).mean(dim=-1, keepdim=True) + self.eps).rsqrt(), none + 1, none)
