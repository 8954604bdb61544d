"""Every choice of `eval` with its default and help text; the command line is generated from it. Nothing heavy here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saeguard.choices import GateChoice
from saeguard.options import option

BENCHMARKS = ("starter", "wmdp-bio", "wmdp-cyber", "wmdp-chem")
TASKS = ("mcq", "near", "open", "perplexity", "muse", "tofu", "mtbench", "lm-eval")
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
        "plain", "mcq: all questions, or (paper) by letter those right without a guardrail under all 24 option orders"
    )
    max_new_tokens: int = option(32, "open: length of an answer")
    max_tokens: int = option(256, "perplexity: tokens of a text that count")
    muse: str | None = option(None, "muse: folder laid out as the data set on the hub")
    retrained_auc: float | None = option(None, "muse: AUC of a model that never saw the forget set (else 0.5)")
    tofu: str | None = option(None, "tofu: folder with the four *_perturbed.jsonl files")
    never_taught: str | None = option(
        None, "tofu: result of a model that was never taught the forget set, for forget quality"
    )
    mt_bench: str | None = option(None, "mtbench: file with the questions")
    runs: int = option(1, "mtbench: how often each question is answered")
    judge: str | None = option(None, "mtbench: address of an OpenAI-compatible endpoint, ending in /v1")
    judge_model: str = option("judge", "mtbench: the judge's name at the endpoint")
    lm_eval_tasks: tuple[str, ...] = option((), "lm-eval: names of the harness's tasks")
    lm_eval_include: str | None = option(None, "lm-eval: folder with tasks of your own")
    keep_text: bool = option(False, "keep prompts and answers in the result, for examples in the report")
    seed: int = option(0, "seed of everything random")


@dataclass(frozen=True)
class SweepAxes:
    """The settings of `fit` that a sweep tries, each with its values; what is not given is as in the preset."""

    n: tuple[int, ...] = option((), "features selected")
    p_ratio: tuple[float, ...] = option((), "percentile of the importance ratio")
    score: tuple[Literal["second_moment", "squared_mean"], ...] = option((), "feature scores")
    gate: tuple[GateChoice, ...] = option((), "gates")
    alpha: tuple[float, ...] = option((), "false positives allowed")
    p_dyn: tuple[float, ...] = option((), "percentiles of the retain statistics, instead of alpha")
    strength: tuple[float, ...] = option((), "clamp values in units of the median residual norm")
    fraction: tuple[float, ...] = option((), "shares of the texts that are used")
