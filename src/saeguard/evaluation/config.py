"""Every choice of `eval` with its default and help text; the command line is generated from it. Nothing heavy here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saeguard.options import option

BENCHMARKS = ("starter", "wmdp-bio", "wmdp-cyber", "wmdp-chem")
TASKS = ("mcq", "near", "open", "perplexity")
DEFAULT_TASKS = ("mcq", "near", "open", "perplexity")


@dataclass(frozen=True)
class EvalConfig:
    """How an evaluation is made."""

    split: Literal["test", "dev", "all"] = option(
        "test", "which side of the items: settings are chosen on dev, reported on test"
    )
    limit: int | None = option(None, "at most this many items of each domain, always the same ones")
    form: Literal["cloze", "letters"] = option("cloze", "mcq: score the options' words, or their letters in a chat")
    protocol: Literal["plain", "paper"] = option(
        "plain", "mcq: all questions, or those the unguarded model gets right under all 24 orders of the options"
    )
    max_new_tokens: int = option(32, "open: length of an answer")
    max_tokens: int = option(256, "perplexity: tokens of a text that count")
    keep_text: bool = option(False, "keep prompts and answers in the result, for examples in the report")
    seed: int = option(0, "seed of everything random")
