"""Prompts that share their beginning: a prompt is read once, and each of its branches is read on from its cache. What
several prompts begin with can be read once too; a guard that judges only whole prompts must not be read with like that.

All in inference mode and in batches of a fixed make-up, so that a guarded and an unguarded run see the same shapes and
a row that does not trigger keeps its bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from saeguard.online.verdicts import Verdict, Watch

BATCH_TOKENS = 12_000
"""Prompt and option tokens of one batch, which bounds the memory that its cache takes."""


@dataclass(frozen=True)
class Read:
    """What a model made of one token sequence: log-probabilities (vocabulary,) of the token that comes next, and,
    where there is a guard, its verdict and whether the answer is the refusal."""

    log_probabilities: Tensor
    verdict: Verdict | None
    refused: bool


@dataclass(frozen=True)
class ReadOn(Read):
    """A prompt that was read, and `later` for each branch: log-probabilities (tokens - 1, vocabulary) after each of its
    tokens but the last."""

    later: tuple[Tensor, ...]


_Prompts = tuple[Tensor, Tensor, Cache]
"""Prompts that were read: logits (rows, vocabulary) after the last token, the mask, and the cache."""


def read(model: Any, rows: Sequence[list[int]], guard: Watch | None) -> list[Read]:
    """Read token sequences in one batch."""
    logits, _, _ = _read_prompts(model, rows)
    return _reads(logits, guard)


def read_options(
    model: Any,
    prompts: Sequence[list[int]],
    branches: Sequence[Sequence[list[int]]],
    guard: Watch | None,
    *,
    share: bool = False,
) -> list[ReadOn]:
    """Read prompts, then equally many branches of each; the verdicts are those on the prompts alone.

    `share`: what all prompts begin with is read once, the rest of them a few at a time.
    """
    shared = common_prefix(prompts) if share and len(prompts) > 1 else 0
    if shared == 0:
        return _branched(model, _read_prompts(model, prompts), branches, guard)
    _, mask, cache = _read_prompts(model, [prompts[0][:shared]])
    at_once = max(1, BATCH_TOKENS // (len(branches[0]) * max(map(len, prompts))))
    found = []
    for start in range(0, len(prompts), at_once):
        some = slice(start, start + at_once)
        begun = _read_rest(model, [row[shared:] for row in prompts[some]], mask, copy.deepcopy(cache))
        found += _branched(model, begun, branches[some], guard)
    return found


def _branched(
    model: Any, prompts: _Prompts, branches: Sequence[Sequence[list[int]]], guard: Watch | None
) -> list[ReadOn]:
    """Read the branches of prompts that were read just now."""
    logits, mask, cache = prompts
    reads = _reads(logits, guard)
    per_prompt = len(branches[0])
    rows = [branch for its in branches for branch in its]
    tokens, token_mask = _pad(rows, left=False)
    tokens, token_mask = tokens[:, :-1], token_mask[:, :-1]
    if tokens.shape[1] == 0:
        later = torch.empty(len(rows), 0, logits.shape[-1])
    else:
        later = _read_on(model, tokens, token_mask, mask, cache, per_prompt, keep=0).log_softmax(dim=-1)
    cut = [later[i, : len(row) - 1] for i, row in enumerate(rows)]
    return [
        ReadOn(one.log_probabilities, one.verdict, one.refused, tuple(cut[i * per_prompt : (i + 1) * per_prompt]))
        for i, one in enumerate(reads)
    ]


def read_endings(
    model: Any, prompts: Sequence[list[int]], branches: Sequence[Sequence[list[int]]], guard: Watch | None
) -> list[list[Read]]:
    """Read prompts, then equally many branches of each to their ends; one `Read` a branch."""
    _, mask, cache = _read_prompts(model, prompts)
    per_prompt = len(branches[0])
    tokens, token_mask = _pad([branch for its in branches for branch in its], left=True)
    logits = _read_on(model, tokens, token_mask, mask, cache, per_prompt, keep=1)[:, -1]
    reads = _reads(logits, guard)
    return [reads[i * per_prompt : (i + 1) * per_prompt] for i in range(len(prompts))]


def common_prefix(rows: Sequence[list[int]]) -> int:
    """How many leading ids all rows share, at most all but the last of the shortest."""
    longest = min(map(len, rows)) - 1
    return next((i for i in range(longest) if len({row[i] for row in rows}) > 1), longest)


def _read_prompts(model: Any, rows: Sequence[list[int]]) -> _Prompts:
    ids, mask = _pad(rows, left=True)
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.inference_mode():
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].float().cpu(), mask, out.past_key_values


def _read_rest(model: Any, rows: Sequence[list[int]], mask: Tensor, cache: Cache) -> _Prompts:
    """Prompts of which `cache` holds the one beginning, by the `rows` of what follows it."""
    tokens, token_mask = _pad(rows, left=True)
    logits = _read_on(model, tokens, token_mask, mask, cache, len(rows), keep=1)[:, -1]
    return logits, torch.cat([mask.repeat_interleave(len(rows), dim=0), token_mask.to(mask.device)], dim=1), cache


def _read_on(
    model: Any, tokens: Tensor, token_mask: Tensor, mask: Tensor, cache: Cache, repeats: int, *, keep: int
) -> Tensor:
    """Logits (rows, tokens, vocabulary) of branches read on from their prompts' cache: the last `keep`; all for 0."""
    tokens, token_mask = tokens.to(mask.device), token_mask.to(mask.device)
    with torch.inference_mode():
        cache.batch_repeat_interleave(repeats)
        before = mask.repeat_interleave(repeats, dim=0)
        positions = before.sum(dim=1, keepdim=True) + (token_mask.cumsum(dim=1) - 1).clamp(min=0)
        out = model(
            input_ids=tokens, attention_mask=torch.cat([before, token_mask], dim=1), position_ids=positions,
            past_key_values=cache, use_cache=True, logits_to_keep=keep,
        )  # fmt: skip
    logits: Tensor = out.logits
    return logits.float().cpu()


def _reads(logits: Tensor, guard: Watch | None) -> list[Read]:
    rows = logits.log_softmax(dim=-1)
    if guard is None:
        return [Read(row, None, False) for row in rows]
    return [Read(*one) for one in zip(rows, guard.verdicts, guard.refusals, strict=True)]


def _pad(rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, its in enumerate(rows):
        where = slice(width - len(its), width) if left else slice(len(its))
        ids[row, where], mask[row, where] = torch.tensor(its), 1
    return ids, mask
