"""Residual streams with gradients, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from saeguard.baselines.likelihood import Batch
from saeguard.hookpoints import HookPoint
from saeguard.model import passing


def residuals(model: nn.Module, layers: Sequence[int], batch: Batch) -> dict[int, Tensor]:
    """Residual stream (rows, tokens, d_model) after each of some blocks, float32. No later block is run."""
    points = [HookPoint(layer) for layer in layers]
    found = passing(model, points, batch["input_ids"], batch["attention_mask"])
    return {point.layer: values.float() for point, values in found.items()}


def counted(batch: Batch) -> Tensor:
    """All tokens (rows, tokens) but padding and the first, whose residual stream is unlike any other."""
    mask = batch["attention_mask"].bool().clone()
    mask[:, 0] = False
    return mask


def squared_distance(found: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Mean of (found - wanted)^2 over the counted tokens and the dimensions; both (rows, tokens, d_model)."""
    return (found - wanted)[mask].square().mean()
