"""`Guardrail`: the frozen artifact. It says where to look, what to look for, when to act and how."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from saeguard import artifact
from saeguard.choices import Action, Hook
from saeguard.clamp import Clamp
from saeguard.errors import ArtifactMismatchError, GuardrailError, MergeError
from saeguard.gate import Gate
from saeguard.hookpoints import HookPoint
from saeguard.model import model_fingerprint, tokenizer_fingerprint, width_of
from saeguard.rule import Rule

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from saeguard.online.intervention import Guard


@dataclass(frozen=True)
class Guardrail:
    """One or more rules for one layer of one model.

    `hook` is the place in the block whose values are encoded, `hook_out` the one whose values are decoded (another for
    transcoders). `model` and `tokenizer` are fingerprints, `sae` says which SAE the features are of.
    """

    layer: int
    hook: Hook
    hook_out: Hook
    model: Mapping[str, Any]
    tokenizer: str
    sae: Mapping[str, Any]
    rules: tuple[Rule, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def rule(self) -> Rule:
        """The rule of a guardrail that holds one. Raises `GuardrailError` where there are several."""
        if len(self.rules) != 1:
            raise GuardrailError(f"this guardrail holds {len(self.rules)} rules: use .rules[i]")
        return self.rules[0]

    @property
    def features(self) -> tuple[int, ...]:
        """Ids of the selected features in rank order."""
        return self.rule.features

    @property
    def threshold(self) -> float:
        """The gate statistic above which a sequence is triggered."""
        return self.rule.threshold

    @property
    def gate(self) -> Gate:
        """How the statistic is computed and when it decides."""
        return self.rule.gate

    @property
    def clamp(self) -> Clamp:
        """What is done at hot tokens."""
        return self.rule.clamp

    @property
    def action(self) -> Action:
        """What a trigger does."""
        return self.rule.action

    @property
    def evidence(self) -> Mapping[str, Any]:
        """Calibration figures."""
        return self.rule.evidence

    @property
    def point(self) -> HookPoint:
        """The hook point that is encoded."""
        return HookPoint(self.layer, self.hook)

    def attach(self, model: nn.Module, tokenizer: Any, *, normalise: bool = False) -> AbstractContextManager[Guard]:
        """Guard `model` inside a `with` block. Raises `AttachError` or `ArtifactMismatchError` before anything runs.

        `normalise`: prompts are also read with odd spelling undone, for detection alone.
        """
        from saeguard.online.intervention import attach

        return attach(self, model, tokenizer, normalise=normalise)

    def check(self, model: nn.Module, tokenizer: Any, *, weights: bool = True) -> None:
        """Refuse a model, tokenizer or layer other than those the guardrail was calibrated on; without `weights` not
        the same model after training."""
        width = width_of(model, HookPoint(self.layer, self.hook_out))
        found = model_fingerprint(model)
        fix = "Fit a guardrail for this model."
        if found["config"] != self.model["config"]:
            raise ArtifactMismatchError.mismatch(
                "config of the model", found=found["config"], expected=self.model["config"], fix=fix
            )
        if weights and found["weights"] != self.model["weights"]:
            raise ArtifactMismatchError.mismatch(
                "weights of the model", found=found["weights"], expected=self.model["weights"],
                fix="If it is that model after training, run `saeguard refit`: it fits the guardrail anew and says "
                "how far the model moved.",
            )  # fmt: skip
        if (vocabulary := tokenizer_fingerprint(tokenizer)) != self.tokenizer:
            raise ArtifactMismatchError.mismatch(
                "tokenizer (vocabulary, special tokens, chat template)",
                found=vocabulary,
                expected=self.tokenizer,
                fix="Use the tokenizer the guardrail was fitted with.",
            )
        if self.rules[0].decoder.shape[1] != width:
            raise ArtifactMismatchError.mismatch(
                f"width at {self.hook_out}", found=width, expected=self.rules[0].decoder.shape[1], fix=fix
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the folder, whole or not at all; an older guardrail there is replaced. Raises `ArtifactError`."""
        from saeguard.card import model_card

        head = {
            "layer": self.layer,
            "hook": self.hook,
            "hook_out": self.hook_out,
            "model": dict(self.model),
            "tokenizer": self.tokenizer,
            "sae": dict(self.sae),
            "versions": dict(self.versions),
        }
        artifact.write(Path(folder), head, self.rules, model_card(self))
        return Path(folder)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the folder, with its card, to the Hugging Face hub; the address of the commit."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "guardrail")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Read a guardrail from a folder or a hub id. Raises an `ArtifactError` on any damage or foreign format."""
        head, rules = artifact.read(artifact.locate(source))
        return cls(**head, rules=rules)


def merge(guardrails: list[Guardrail]) -> Guardrail:
    """One guardrail with the rules of several, for one pass. Raises `MergeError` unless layer and model agree."""
    if not guardrails:
        raise MergeError("nothing to merge: expected at least one guardrail")
    first = guardrails[0]
    for other in guardrails[1:]:
        for part in ("layer", "hook", "hook_out", "tokenizer"):
            if getattr(other, part) != getattr(first, part):
                raise MergeError.mismatch(
                    f"{part} of the guardrails", found=getattr(other, part), expected=getattr(first, part),
                    fix="Only guardrails of one layer of one model become one.",
                )  # fmt: skip
        if other.model["weights"] != first.model["weights"]:
            raise MergeError.mismatch(
                "model weights",
                found=other.model["weights"],
                expected=first.model["weights"],
                fix="Fit both on one model.",
            )
    rules = tuple(rule for guardrail in guardrails for rule in guardrail.rules)
    names = [rule.name for rule in rules]
    if len(set(names)) < len(names):
        raise MergeError(f"two rules have one name: {sorted(names)}. Rename one when fitting it (--name).")
    return replace(first, rules=rules)
