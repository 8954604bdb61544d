"""The one mask that everything which counts tokens uses.

A *valid* token is attended to (not padding), is not a special token by its id, and is not the first
token of its sequence. The first token is either BOS, special anyway, or the attention sink of a model
without BOS, whose residual stream is unlike any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saeguard.errors import AttachError


def special_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of all special tokens of a Hugging Face tokenizer, sorted."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    return tuple(sorted(int(i) for i in ids))


def without_padding(input_ids: Tensor, pad: int | None) -> Tensor:
    """Attention mask (batch, tokens) that leaves out the padding token before and after each sequence."""
    if pad is None:
        return torch.ones_like(input_ids)
    kept = input_ids.ne(pad).long()
    return kept.cumsum(dim=1).mul(kept.flip(1).cumsum(dim=1).flip(1)).clamp(max=1)


@dataclass(frozen=True)
class TokenMasks:
    """Boolean masks (batch, tokens): `attended` is all but padding, `first` the first token of its sequence."""

    attended: Tensor
    first: Tensor
    valid: Tensor


def attended_tokens(mask: Any, input_ids: Tensor, past: Tensor) -> Tensor:
    """Which tokens of a forward pass (batch, tokens) are not padding, from the attention mask the model was given.

    `past` (batch, seen) says it of the tokens before them. The mask is None (no padding), (batch, seen + tokens), or
    what `generate` prepares for a static cache: (batch, 1, tokens, room), or such a mask for each kind of layer.
    Raises `AttachError` for any other, among them those that are not causal.
    """
    if isinstance(mask, Mapping):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    seen, end = past.shape[1], past.shape[1] + input_ids.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask[:, seen:end].shape == input_ids.shape:
        return mask[:, seen:end].bool()
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] >= end:
        allowed = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, :end].expand(len(input_ids), -1, -1)
        own = allowed[:, :, seen:].diagonal(dim1=1, dim2=2)
        keys = torch.cat([past.to(own.device), own], dim=1)
        if torch.equal(allowed, keys[:, None] & keys.new_ones(end - seen, end).tril(seen)):
            return own
    raise AttachError.mismatch(
        "attention mask of a guarded model", found=getattr(mask, "shape", type(mask).__name__),
        expected=f"causal over {end} tokens, or (batch, {end})", fix="Pass the tokenizer's attention_mask.",
    )  # fmt: skip


def token_masks(
    input_ids: Tensor, attended: Tensor, special_ids: Tensor, *, started: Tensor | None = None
) -> TokenMasks:
    """The masks of a block of tokens, from its ids and its boolean attention mask (batch, tokens).

    `started` (batch,) says which rows already had a token before this block (a continued cache), so that
    their first token here is not the first of its sequence.
    """
    first = attended & (attended.cumsum(dim=-1) == 1)
    if started is not None:
        first &= ~started[:, None]
    return TokenMasks(attended, first, attended & ~first & ~_among(input_ids, special_ids))


def _among(ids: Tensor, few: Tensor) -> Tensor:
    """Which ids (batch, tokens) are among some (k,)."""
    if ids.shape[-1] == 1:  # a token at a time: `isin` sorts, and takes five times as long
        return (ids[..., None] == few).any(dim=-1)
    return torch.isin(ids, few)
