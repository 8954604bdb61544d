"""The guardrails of an engine, read and checked before anything is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saeguard.errors import EngineError, UsageError
from saeguard.guardrail import Guardrail
from saeguard.model import load_model, load_tokenizer
from saeguard.rule import Rule
from saeguard.serving.proof_texts import ProofTexts
from saeguard.tokens import special_token_ids
from saeguard.windows import bos_ids


@dataclass(frozen=True)
class Loaded:
    """Guardrails by id, and the tokenizer of the model they guard."""

    guardrails: Mapping[str, Guardrail]
    tokenizer: Any

    @property
    def special(self) -> tuple[int, ...]:
        """Ids of the special tokens."""
        return special_token_ids(self.tokenizer)

    def rules(self) -> dict[int, dict[str, Rule]]:
        """For each guarded layer its rules, named by their guardrail's id, or `id/rule` where it has several."""
        layers: dict[int, dict[str, Rule]] = {}
        for name, guardrail in self.guardrails.items():
            for rule in guardrail.rules:
                full = name if len(guardrail.rules) == 1 else f"{name}/{rule.name}"
                layers.setdefault(guardrail.layer, {})[full] = rule
        return layers

    def proof_prompts(self, room: int) -> dict[str, list[list[int]]]:
        """For each rule, the token ids of its proof texts, cut to `room`."""
        bos = bos_ids(self.tokenizer)

        def ids(text: str) -> list[int]:
            return (bos + list(self.tokenizer(text, add_special_tokens=False)["input_ids"]))[:room]

        every = (item for rules in self.rules().values() for item in rules.items())
        return {name: [ids(text) for text in ProofTexts.of(rule).all()] for name, rule in every}


def parse_guardrails(text: str) -> dict[str, str]:
    """`id=DIR,id=DIR` as a mapping. Raises `UsageError`."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    found = {name.strip(): folder.strip() for name, _, folder in pairs}
    if not found or len(found) < len(pairs) or not all(name and folder for name, folder in found.items()):
        raise UsageError(f"guardrails {text!r}: expected id=DIR[,id=DIR…], each id once")
    return found


def load_guardrails(folders: Mapping[str, str], tokenizer: str) -> Loaded:
    """Read guardrails and tokenizer. Raises an `ArtifactError`, or `EngineError` for what an engine cannot guard."""
    guardrails = {name: Guardrail.from_pretrained(folder) for name, folder in folders.items()}
    for name, guardrail in guardrails.items():
        if (guardrail.hook, guardrail.hook_out) != ("resid_post", "resid_post"):
            raise EngineError.mismatch(
                f"hook point of guardrail {name}", found=f"{guardrail.hook} to {guardrail.hook_out}",
                expected="resid_post", fix="vLLM fuses the parts of a layer; there only what leaves it is guarded.",
            )  # fmt: skip
        if any(rule.gate.moment == "block" for rule in guardrail.rules):
            raise EngineError(
                f"guardrail {name} decides by block: from the end of a prompt for all its tokens. An engine that reads "
                "prompts in chunks has then let the first ones through. Fit a running gate (the default preset)."
            )
    return Loaded(guardrails, load_tokenizer(tokenizer))


def check_model(loaded: Loaded, folder: str) -> None:
    """Refuse a checkpoint or tokenizer other than those the guardrails were calibrated on: `ArtifactMismatchError`.

    The checkpoint is opened with transformers for it, in host memory: an engine fuses and splits the weights, so that
    their fingerprint can no longer be taken. That it computes the same is what the start-up proof shows.
    """
    model, _ = load_model(folder, device="cpu")
    for guardrail in loaded.guardrails.values():
        guardrail.check(model, loaded.tokenizer)
