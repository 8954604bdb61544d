"""Throughput of the serving engine with and without a guardrail, in pairs, so that a machine whose speed drifts does
not bend the ratio. The engine alone: what HTTP costs is the same on both sides and would only bring them closer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from queue import SimpleQueue
from statistics import median
from typing import Any

from saeguard.errors import EngineError
from saeguard.guardrail import Guardrail
from saeguard.progress import Advance
from saeguard.serving.engine import Engine, Limits
from saeguard.serving.job import Event, Failed, Finished, Job
from saeguard.serving.readings import attached
from saeguard.serving.sampling import Sampling

NEW = 32


def throughput_pairs(
    model: Any, tokenizer: Any, guardrail: Guardrail, prompts: Sequence[Sequence[int]], pairs: int, advance: Advance
) -> dict[str, float]:
    """Tokens written a second, all prompts at once and `NEW` tokens each: medians, and the median of the ratios."""
    guarded: list[float] = []
    unguarded: list[float] = []
    tokens_per_second(model, tokenizer, [("guard", guardrail)], prompts)  # the first run is slower than any other
    for i in range(pairs):
        for guarding in (i % 2 == 0, i % 2 == 1):
            kept = [("guard", guardrail)] if guarding else []
            (guarded if guarding else unguarded).append(tokens_per_second(model, tokenizer, kept, prompts))
        advance(1)
    ratios = [one / other for one, other in zip(guarded, unguarded, strict=True)]
    return {
        "guardedtokens_per_second": median(guarded), "unguardedtokens_per_second": median(unguarded),
        "guarded_share": median(ratios), "lowest_share": min(ratios), "highest_share": max(ratios),
    }  # fmt: skip


def tokens_per_second(
    model: Any, tokenizer: Any, guardrails: Sequence[tuple[str, Guardrail]], prompts: Sequence[Sequence[int]]
) -> float:
    """All prompts at once, `NEW` tokens each, from the first prompt's reading to the last token."""
    told: SimpleQueue[Event] = SimpleQueue()
    with attached(guardrails, model, tokenizer) as guards:
        engine = Engine(model, tokenizer, guards, Limits(rows=len(prompts), waiting=len(prompts)), ends=frozenset())
        engine.start()
        try:
            began = time.perf_counter()
            engine.submit([Job(prompt, Sampling(NEW), told.put) for prompt in prompts])
            open_ = len(prompts)
            while open_:
                event = told.get()
                if isinstance(event, Failed):
                    raise EngineError(engine.fault or event.message)
                open_ -= isinstance(event, Finished)
            return NEW * len(prompts) / (time.perf_counter() - began)
        finally:
            engine.stop(grace=0)
