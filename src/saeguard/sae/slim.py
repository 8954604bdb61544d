"""The few columns of an SAE that a guardrail carries.

For a pointwise activation (ReLU, JumpReLU) n encoder columns give the selected activations exactly. A TopK
feature is active only if it is among the k largest of its token, so either the full encoder travels too
(`exact`), or each selected feature gets a fixed threshold found on text, whose agreement is measured (`threshold`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder, TopK
from saeguard.sae.scaling import InputScaling


@dataclass(frozen=True)
class SlimEncoder:
    """Encoder of n selected features: `columns` (d_model, n), `bias` (n), `threshold` (n).

    With `k`, activity is exact TopK: `full_columns` (d_model, d_sae) and `full_bias` (d_sae) are the whole encoder.
    With `scaling` the columns are of the scaled input; activations are in units of the input all the same.
    """

    columns: Tensor
    bias: Tensor
    threshold: Tensor
    k: int | None = None
    full_columns: Tensor | None = None
    full_bias: Tensor | None = None
    scaling: InputScaling | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Activations (..., n) of the selected features, float32, from values at the SAE's place (..., d_model)."""
        flat = hidden.flatten(0, -2).float()
        if self.scaling is None:
            return self._activations(flat).reshape(*hidden.shape[:-1], len(self.bias))
        x, unit, _ = self.scaling(flat)
        return (self._activations(x) * unit).reshape(*hidden.shape[:-1], len(self.bias))

    def _activations(self, flat: Tensor) -> Tensor:
        """(tokens, n), in units of the (scaled) input (tokens, d_model)."""
        pre = torch.addmm(self.bias, flat, self.columns)
        bar = self.threshold
        if self.k is not None and self.full_columns is not None and self.full_bias is not None:
            everything = torch.addmm(self.full_bias, flat, self.full_columns)
            bar = _rank_bar(everything, self.k).clamp(min=0)
        return torch.where(pre > bar, pre, 0.0)

    def to(self, device: torch.device | str) -> SlimEncoder:
        """The same on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """What goes into a file."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


def _rank_bar(pre: Tensor, k: int) -> Tensor:
    """Halfway (rows, 1) between the k-th and the next largest of each row.

    Not the k-th itself: the selected columns are multiplied apart from the rest, and may round differently.
    """
    if k >= pre.shape[-1]:
        return pre.new_zeros(len(pre), 1)
    return pre.topk(k + 1, dim=-1).values[:, -2:].mean(dim=-1, keepdim=True)


def slim(sae: SparseAutoencoder, ids: list[int], *, topk_thresholds: Tensor | None = None) -> SlimEncoder:
    """The slim encoder of some features. For TopK, exact unless thresholds (n,) are given."""
    columns, bias = sae.W_enc[:, ids].contiguous(), sae.b_enc[ids].contiguous()
    threshold = torch.zeros(len(ids))
    if isinstance(sae.activation, JumpReLU):
        threshold = sae.activation.threshold[ids].clamp(min=0)
    if isinstance(sae.activation, TopK):
        if topk_thresholds is None:
            return SlimEncoder(columns, bias, threshold, sae.activation.k, sae.W_enc, sae.b_enc, sae.scaling)
        threshold = topk_thresholds.clamp(min=0)
    return SlimEncoder(columns, bias, threshold.contiguous(), scaling=sae.scaling)


@dataclass(frozen=True)
class TopKAgreement:
    """How well fixed thresholds tell which selected features are among the top k, over some tokens.

    `agreement` = tokens-times-features active under both / active under either (Jaccard index).
    """

    agreement: float
    active: int
    tokens: int


def topk_thresholds(sae: SparseAutoencoder, ids: list[int], hidden: Tensor) -> Tensor:
    """For each feature the threshold (n,) that best tells being in the top k from not being, on (tokens, d_model)."""
    if not isinstance(sae.activation, TopK):
        raise SAEError(f"only TopK needs fixed thresholds, this SAE is {type(sae.activation).__name__}")
    x = hidden.float() if sae.scaling is None else sae.scaling(hidden.float()).x
    pre = torch.addmm(sae.b_enc[ids], x, sae.W_enc[:, ids])
    member = slim(sae, ids)(hidden) > 0
    return torch.stack([_best_threshold(pre[:, j], member[:, j]) for j in range(len(ids))])


def topk_agreement(sae: SparseAutoencoder, ids: list[int], thresholds: Tensor, hidden: Tensor) -> TopKAgreement:
    """Measure fixed thresholds against exact TopK on tokens (tokens, d_model) not used to find them."""
    exact = slim(sae, ids)(hidden) > 0
    fixed = slim(sae, ids, topk_thresholds=thresholds)(hidden) > 0
    either = int((exact | fixed).sum())
    return TopKAgreement(int((exact & fixed).sum()) / max(1, either), either, len(hidden))


def _best_threshold(pre: Tensor, member: Tensor) -> Tensor:
    """The cut with the fewest errors; where the feature is never a member, above all that was seen."""
    order = pre.argsort(descending=True)
    ordered, hits = pre[order], member[order]
    if not bool(hits.any()):
        return pre.max() + 1
    errors = hits.sum() - hits.cumsum(0) + (~hits).cumsum(0)
    cut = int(errors.argmin())
    below = ordered[cut + 1] if cut + 1 < len(ordered) else ordered[cut] - 1e-3
    return (ordered[cut] + below) / 2
