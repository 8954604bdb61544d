"""`SparseAutoencoder`: the one in-memory form every SAE file is read into.

    pre   = h @ W_enc + b_enc             h: residual stream (..., d_model)
    a     = activation(pre)               a: feature activations (..., d_sae)
    h_hat = a @ W_dec + b_dec

Plain units: any scaling of the input, subtraction of `b_dec` before the encoder or decoder-norm
units are folded into the weights when a file is read, so `a` and `h` mean one thing everywhere.
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

    Shapes: `W_enc` (d_model, d_sae), `b_enc` (d_sae), `W_dec` (d_sae, d_model), `b_dec` (d_model).
    `W_skip` (d_model, d_model) is a linear path beside the features, of a few SAEs.
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

    def __post_init__(self) -> None:
        if self.W_enc.dim() != 2:
            raise self._refusal("W_enc", tuple(self.W_enc.shape), "(d_model, d_sae)")
        d_model, d_sae = self.W_enc.shape
        parts = {
            "b_enc": (self.b_enc, (d_sae,)),
            "W_dec": (self.W_dec, (d_sae, d_model)),
            "b_dec": (self.b_dec, (d_model,)),
        }
        if isinstance(self.activation, JumpReLU):
            parts["threshold"] = self.activation.threshold, (d_sae,)
        if self.W_skip is not None:
            parts["W_skip"] = self.W_skip, (d_model, d_model)
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
        """Residual stream (..., d_model) to feature activations (..., d_sae), in float32."""
        pre = torch.addmm(self.b_enc, h.float().flatten(0, -2), self.W_enc)
        return self.activation(pre).reshape(*h.shape[:-1], self.d_sae)

    def decode(self, a: Tensor) -> Tensor:
        """Feature activations (..., d_sae) to the reconstructed residual stream (..., d_model)."""
        return a @ self.W_dec + self.b_dec

    def reconstruct(self, h: Tensor) -> Tensor:
        """What the SAE makes of the residual stream (..., d_model), with its linear path where it has one."""
        h_hat = self.decode(self.encode(h))
        return h_hat if self.W_skip is None else h_hat + h.float() @ self.W_skip

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
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
