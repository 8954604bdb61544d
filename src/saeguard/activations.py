"""Model and windows to residual streams, batch by batch; nothing of a corpus is held in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.errors import NonFiniteError
from saeguard.model import residual_stream
from saeguard.tokens import TokenMasks, special_token_ids, token_masks
from saeguard.windows import Window, batches, pad

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class ResidualBatch:
    """Residual stream (batch, tokens, d_model) of some windows, with their ids and masks (batch, tokens)."""

    windows: list[Window]
    input_ids: Tensor
    hidden: Tensor
    masks: TokenMasks


def residual_batches(
    model: nn.Module, tokenizer: Any, layer: int, windows: Iterable[Window], *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[ResidualBatch]:
    """Run windows through the model up to `layer`. Raises `NonFiniteError` on NaN or infinity."""
    device = next(model.parameters()).device
    special = torch.tensor(special_token_ids(tokenizer), device=device)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for batch in batches(windows, tokens=batch_tokens):
        input_ids, mask = (tensor.to(device) for tensor in pad(batch, pad_id=pad_id))
        hidden = residual_stream(model, layer, input_ids, mask)
        attended = mask.bool()
        check_finite(hidden[attended], layer)
        yield ResidualBatch(batch, input_ids, hidden, token_masks(input_ids, attended, special))


def check_finite(hidden: Tensor, layer: int) -> None:
    """Raise `NonFiniteError` where the residual stream is not made of numbers."""
    if not bool(hidden.isfinite().all()):
        raise NonFiniteError(
            f"the residual stream after layer {layer} holds NaN or infinite values. Load the model in float32 or "
            "bfloat16 (float16 overflows in many models), and check its weights."
        )
