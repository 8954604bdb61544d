"""How long a subject takes for a token of its answers, beside the unguarded model, in pairs one after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from saeguard.evaluation.subject import Subject

NEW = 16


@dataclass(frozen=True)
class Speed:
    """Median milliseconds a token written, prompt included, and the median of the paired ratios less one."""

    ms_per_token: float
    overhead: float


def time_per_token(subject: Subject, unguarded: Subject, prompts: Sequence[list[int]]) -> Speed:
    """Time `NEW` tokens after each prompt, one prompt at a time; the first pair warms up and does not count."""
    mine: list[float] = []
    plain: list[float] = []
    for i, prompt in enumerate([prompts[0], *prompts]):
        pair = [(subject, mine), (unguarded, plain)]
        for one, times in pair if i % 2 else reversed(pair):
            times.append(_seconds(one, prompt))
    ratios = [a / b for a, b in zip(mine[1:], plain[1:], strict=True)]
    return Speed(1000 * median(mine[1:]) / NEW, median(ratios) - 1)


def _seconds(subject: Subject, prompt: list[int]) -> float:
    with subject.open() as it:
        ids = torch.tensor([prompt], device=it.model.device)
        options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        start = time.perf_counter()
        it.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=it.tokenizer.pad_token_id, **options)
        return time.perf_counter() - start
