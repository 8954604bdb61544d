"""Model and windows to the values at a hook point, batch by batch; nothing of a corpus is held in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.choices import Hook
from saeguard.errors import NonFiniteError
from saeguard.hookpoints import HookPoint
from saeguard.model import capture, input_device
from saeguard.tokens import TokenMasks, special_token_ids, token_masks
from saeguard.windows import Window, batches, pad

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class ResidualBatch:
    """Values at a hook point (batch, tokens, d) of some windows, with their ids and masks (batch, tokens).

    `norms` (batch, tokens) are those of the residual stream after the layer, whatever the hook point.
    """

    windows: list[Window]
    input_ids: Tensor
    hidden: Tensor
    masks: TokenMasks
    norms: Tensor


def residual_batches(
    model: nn.Module, tokenizer: Any, layer: int, windows: Iterable[Window], *, hook: Hook = "resid_post",
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[ResidualBatch]:  # fmt: skip
    """Run windows through the model up to `layer`. Raises `NonFiniteError` on NaN or infinity."""
    point, stream = HookPoint(layer, hook), HookPoint(layer)
    device = input_device(model)
    special = torch.tensor(special_token_ids(tokenizer))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for batch in batches(windows, tokens=batch_tokens):
        input_ids, mask = (tensor.to(device) for tensor in pad(batch, pad_id=pad_id))
        values = capture(model, [*{point, stream}], input_ids, mask)
        hidden = values[point]
        input_ids, attended = input_ids.to(hidden.device), mask.to(hidden.device).bool()
        check_finite(hidden[attended], point)
        masks = token_masks(input_ids, attended, special.to(hidden.device))
        yield ResidualBatch(batch, input_ids, hidden, masks, values[stream].float().norm(dim=-1))


def check_finite(hidden: Tensor, point: HookPoint) -> None:
    """Raise `NonFiniteError` where what passes a hook point is not made of numbers."""
    if not bool(hidden.isfinite().all()):
        raise NonFiniteError(
            f"{point} holds NaN or infinite values. Load the model in float32 or "
            "bfloat16 (float16 overflows in many models), and check its weights."
        )
