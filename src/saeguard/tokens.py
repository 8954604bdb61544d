"""The one mask that everything which counts tokens uses.

A *valid* token is attended to (not padding), is not a special token by its id, and is not the first
token of its sequence. The first token is either BOS, special anyway, or the attention sink of a model
without BOS, whose residual stream is unlike any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def special_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of all special tokens of a Hugging Face tokenizer, sorted."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    return tuple(sorted(int(i) for i in ids))


@dataclass(frozen=True)
class TokenMasks:
    """Boolean masks (batch, tokens): `attended` is all but padding, `first` the first token of its sequence."""

    attended: Tensor
    first: Tensor
    valid: Tensor


def token_masks(input_ids: Tensor, attended: Tensor, special_ids: Tensor, *, started: Tensor | None = None) -> TokenMasks:
    """The masks of a block of tokens, from its ids and its boolean attention mask (batch, tokens).

    `started` (batch,) says which rows already had a token before this block (a continued cache), so that
    their first token here is not the first of its sequence.
    """
    first = attended & (attended.cumsum(dim=-1) == 1)
    if started is not None:
        first &= ~started[:, None]
    return TokenMasks(attended, first, attended & ~first & ~torch.isin(input_ids, special_ids))
