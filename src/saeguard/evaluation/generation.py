"""Greedy or sampled answers to many prompts at once, with the verdict on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saeguard.evaluation.subject import Opened
from saeguard.generate import REFUSAL

BATCH_PROMPTS = 32


@dataclass(frozen=True)
class Generated:
    """An answer: its text, its length in tokens, and what the guardrail decided, where there is one."""

    text: str
    tokens: int
    triggered: bool | None
    statistic: float | None


def by_length(rows: Sequence[list[int]], size: int = BATCH_PROMPTS) -> list[list[int]]:
    """Indices of rows of like length, `size` at a time."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def generate_answers(
    it: Opened, prompts: Sequence[list[int]], max_new_tokens: int, *, temperature: float = 0.0
) -> list[Generated]:
    """Continue prompts, in one batch. Under the action `refuse` a triggered answer is replaced by the refusal."""
    tokenizer = it.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts], device=it.model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=it.model.device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = it.model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling)
    special = set(tokenizer.all_special_ids)
    rows = out[:, width:].tolist()
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    lengths = [sum(token not in special for token in row) for row in rows]
    if it.guard is None:
        return [Generated(text, tokens, None, None) for text, tokens in zip(texts, lengths, strict=True)]
    return [
        Generated(REFUSAL if refuses else text, tokens, verdict.triggered, verdict.statistic)
        for text, tokens, verdict, refuses in zip(texts, lengths, it.guard.verdicts, it.guard.refusals, strict=True)
    ]
