"""`SparseAutoencoder`: the one in-memory form every SAE file is read into.

    pre   = h @ W_enc + b_enc             h: residual stream (..., d_model)
    a     = activation(pre)               a: feature activations (..., d_sae)
    h_hat = a @ W_dec + b_dec

Plain units: any scaling of the input, subtraction of `b_dec` before the encoder or decoder-norm
units are folded into the weights when a file is read, so `a` and `h` mean one thing everywhere. What is scaled token
by token cannot be folded; such an SAE carries a `scaling`, and its `a` is in units of `h` all the same.

A transcoder reads at one place and writes at another: d_out, its width there, may differ from d_model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from saeguard.choices import Hook
from saeguard.errors import SAEError
from saeguard.sae.scaling import InputScaling

HASHED_ROWS = 1024


@dataclass(frozen=True)
class ReLU:
    """a = max(pre, 0)."""

    def __call__(self, pre: Tensor) -> Tensor:
        return pre.relu()


@dataclass(frozen=True)
class JumpReLU:
    """a = pre where pre > threshold (strictly) and pre > 0, else 0; one threshold a feature."""

    threshold: Tensor

    def __call__(self, pre: Tensor) -> Tensor:
        return torch.where(pre > self.threshold.clamp(min=0), pre, 0.0)


@dataclass(frozen=True)
class TopK:
    """The k largest pre-activations of each token, through a ReLU; all others are 0."""

    k: int

    def __call__(self, pre: Tensor) -> Tensor:
        values, ids = pre.relu().topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter_(-1, ids, values)


Activation = ReLU | JumpReLU | TopK


@dataclass(frozen=True)
class SparseAutoencoder:
    """A sparse autoencoder in plain units, float32.

    Shapes: `W_enc` (d_model, d_sae), `b_enc` (d_sae), `W_dec` (d_sae, d_out), `b_dec` (d_out); d_out = d_model but for
    transcoders. `W_skip` (d_model, d_out) is a linear path beside the features, of a few SAEs. Weights may be
    transposed views, so that a file that stores them so is not copied.
    `source` says where it came from (path or hub id); `metadata` is the file's own description.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: Activation
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    W_skip: Tensor | None = None
    scaling: InputScaling | None = None

    def __post_init__(self) -> None:
        for name, weight, axes in (("W_enc", self.W_enc, "(d_model, d_sae)"), ("W_dec", self.W_dec, "(d_sae, d_out)")):
            if weight.dim() != 2:
                raise self._refusal(name, tuple(weight.shape), axes)
        d_model, d_sae = self.W_enc.shape
        d_out = self.d_out if self.transcodes else d_model
        parts = {
            "b_enc": (self.b_enc, (d_sae,)),
            "W_dec": (self.W_dec, (d_sae, d_out)),
            "b_dec": (self.b_dec, (d_out,)),
        }
        if isinstance(self.activation, JumpReLU):
            parts["threshold"] = self.activation.threshold, (d_sae,)
        if self.W_skip is not None:
            parts["W_skip"] = self.W_skip, (d_model, d_out)
        for name, (tensor, shape) in parts.items():
            if tuple(tensor.shape) != shape:
                raise self._refusal(name, tuple(tensor.shape), shape)
        if isinstance(self.activation, TopK) and not 1 <= self.activation.k <= d_sae:
            raise self._refusal("k", self.activation.k, f"1 to {d_sae}")

    def _refusal(self, part: str, found: Any, expected: Any) -> SAEError:
        return SAEError.mismatch(
            f"{part} of the SAE {self.source or '(in memory)'}",
            found=found, expected=expected, fix="The file is damaged or of another layout.",
        )  # fmt: skip

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read an SAE by folder, file or hub reference (`saeguard.sae.load`). Raises `SAEError`."""
        from saeguard.sae.load import load

        return load(source)  # type: ignore[return-value]

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """The width of what is decoded: that of `d_model` but for transcoders."""
        return self.W_dec.shape[1]

    @property
    def transcodes(self) -> bool:
        """Whether what is decoded belongs to another place than what is encoded."""
        return self.hook_out != self.hook

    @property
    def layer(self) -> int | None:
        """The layer the SAE says it was trained on, where its file says so."""
        layer = self.metadata.get("layer")
        return None if layer is None else int(layer)

    @property
    def hook(self) -> Hook:
        """The place in the block whose values are encoded."""
        hook: Hook = self.metadata.get("hook", "resid_post")
        return hook

    @property
    def hook_out(self) -> Hook:
        """The place whose values are decoded: another one for transcoders."""
        hook: Hook = self.metadata.get("hook_out", self.hook)
        return hook

    def encode(self, h: Tensor) -> Tensor:
        """Values at `hook` (..., d_model) to feature activations (..., d_sae), in float32."""
        flat = h.float().flatten(0, -2)
        if self.scaling is None:
            return self._activations(flat).reshape(*h.shape[:-1], self.d_sae)
        x, unit, _ = self.scaling(flat)
        return (self._activations(x) * unit).reshape(*h.shape[:-1], self.d_sae)

    def decode(self, a: Tensor) -> Tensor:
        """Feature activations (..., d_sae) to the values (..., d_out) at `hook_out`, by the features and `b_dec` alone.

        With a `scaling` that is undone, `b_dec` is in units of the scaled input: `reconstruct` has the whole.
        """
        return a @ self.W_dec + self.b_dec

    def reconstruct(self, h: Tensor) -> Tensor:
        """What the SAE makes of values at `hook` (..., d_model): those at `hook_out` (..., d_out), in float32.

        The bias and a mean that was taken out are scaled back with the features; the linear path, where there is one,
        reads what a transcoder reads.
        """
        flat = h.float().flatten(0, -2)
        if self.scaling is None:
            out, read = self.decode(self._activations(flat)), flat
        else:
            x, unit, mean = self.scaling(flat)
            out, read = self.decode(self._activations(x)) * unit + mean, x if self.transcodes else flat
        if self.W_skip is not None:
            out = out + read @ self.W_skip
        return out.reshape(*h.shape[:-1], self.d_out)

    def _activations(self, x: Tensor) -> Tensor:
        """Activations (tokens, d_sae), in the units of the (scaled) input (tokens, d_model)."""
        return self.activation(torch.addmm(self.b_enc, x, self.W_enc))

    def to(self, device: torch.device | str) -> SparseAutoencoder:
        """The same SAE on another device."""
        activation = self.activation
        if isinstance(activation, JumpReLU):
            activation = JumpReLU(activation.threshold.to(device))
        moved = {name: getattr(self, name).to(device) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        if self.W_skip is not None:
            moved["W_skip"] = self.W_skip.to(device)
        return replace(self, **moved, activation=activation)

    def fingerprint(self) -> str:
        """A hash of every weight and of the activation, the same on every machine."""
        digest = hashlib.sha256(type(self.activation).__name__.encode())
        if isinstance(self.activation, TopK):
            digest.update(str(self.activation.k).encode())
        tensors = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        if isinstance(self.activation, JumpReLU):
            tensors.append(self.activation.threshold)
        if self.W_skip is not None:
            tensors.append(self.W_skip)
        if self.scaling is not None:
            digest.update(repr(self.scaling).encode())
        for tensor in tensors:
            for rows in torch.split(tensor.detach(), HASHED_ROWS):
                digest.update(rows.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
