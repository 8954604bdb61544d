"""Every choice of `attack` with its default and help text: the command line is made from it. Nothing heavy here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saeguard.options import option

Refit = Literal["threshold", "whole"]
FAMILIES = {
    "dilution": "filler before, after and around the question",
    "splitting": "the question over several turns",
    "conversations": "after a long conversation on other things",
    "spelling": "spaces, leetspeak, ROT13, Base64, hyphens, homoglyphs, zero-width characters",
    "rewriting": "synonyms; with --endpoint also paraphrase and translation",
    "jailbreaks": "templates that talk a model into answering",
    "formats": "a role, code, JSON, CSV, a poem",
    "prefill": "the beginning of the answer is written already",
    "shots": "after answered examples",
    "suffix": "white box: free tokens searched against the gate",
    "weights": "white box: the hook removed, the weights rounded to 8 and 4 bits",
    "activations": "white box: the residual stream changed in front of the guard or behind it",
    "reading": "white box: logit lens and linear probe behind the guard",
    "relearning": "white box: the model trained further on the topic's text, its neighbours' or other text",
}


@dataclass(frozen=True)
class AttackConfig:
    """How attacks are made and bounded."""

    split: Literal["test", "dev", "all"] = option("test", "which side of the questions is attacked")
    limit: int | None = option(60, "at most this many questions of each domain")
    others: int = option(4, "of each domain off the topic at most this many, to see what harm an attack provokes")
    lengths: tuple[int, ...] = option((100, 400, 1600, 4000), "dilution: tokens of filler")
    budget: int = option(40_000, "prompt tokens that one attack may have read on the topic, and again off it")
    minutes: float = option(60.0, "no attack is begun after this long; run again to go on")
    steps: int = option(20, "suffix, error-found, error-forced: steps for one question")
    seconds: float = option(10.0, "the same: seconds for one question")
    endpoint: str | None = option(
        None, "rewriting: address of an OpenAI-compatible endpoint, ending in /v1; its key: SAEGUARD_ENDPOINT_KEY"
    )
    endpoint_model: str = option("model", "rewriting: the model's name at the endpoint")
    languages: tuple[str, ...] = option(("German", "Spanish", "Russian"), "rewriting: languages to translate into")
    epochs: tuple[int, ...] = option((1, 5, 20, 50), "relearning: epochs after which the questions are asked")
    documents: int = option(48, "relearning: at most about this many documents are trained on")
    learning_rate: float = option(3e-5, "relearning: learning rate where all weights are trained, constant")
    lora_learning_rate: float = option(3e-4, "relearning: learning rate of LoRA adapters, constant")
    lora_rank: int = option(8, "relearning: rank of LoRA adapters")
    batch: int = option(8, "relearning: windows in a step")
    max_tokens: int = option(128, "relearning: tokens of a window")
    refit: tuple[Refit, ...] = option(
        (), "relearning: also ask after `refit` on the trained model, of the threshold alone or of the whole guardrail"
    )
    steering_steps: int = option(40, "activations: steps of the search for a vector")
    keep_text: bool = option(False, "keep prompts and answers in the result")
    seed: int = option(0, "seed of everything random")
