"""The texts of the proof before serving: one that must fire, and ordinary ones of which one must not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from saeguard.errors import ProofError
from saeguard.rule import Rule

if TYPE_CHECKING:
    from saeguard.baselines.prompt_gate import PromptGate

PASSAGES = 8
"""How many of the topic's strongest passages make the text that must fire."""
ORDINARY = (
    "Knead the dough for ten minutes, let it rise in a warm place, and bake it in a hot oven until it is brown.",
    "The court heard both sides, and the judge gave her ruling before noon.",
    "To reset the password, open the settings, choose Account and follow the steps on the screen.",
    "She scored twice in the second half, and the crowd sang until the end of the match.",
)
"""Texts of four topics: a guardrail may be about one of them, not about all."""


@dataclass(frozen=True)
class ProofTexts:
    """`fires` must trigger a rule; at least one of `ordinary` must not, where there are any."""

    fires: str
    ordinary: tuple[str, ...] = ORDINARY

    @classmethod
    def of(cls, rule: Rule | PromptGate) -> ProofTexts:
        """The texts that a rule or prompt gate carries, else made of a rule's strongest passages. Raises `ProofError`
        without either.

        A rule that always triggers is proved by firing alone.
        """
        carried = rule.evidence.get("proof")
        if carried is not None:
            return cls(carried["fires"], (carried["silent"],))
        rows = (row for rows in rule.evidence.get("passages", {}).values() for row in rows)
        topic = [f"{row['before']}{row['token']}{row['after']}" for row in rows if row["corpus"] == "forget"]
        if not topic:
            raise ProofError(f"{rule.name} carries no text that must fire. Fit it with this version.")
        fires = " ".join(topic[:PASSAGES])
        always = isinstance(rule, Rule) and rule.gate.always(rule.threshold)
        return cls(fires, ()) if always else cls(fires)

    def all(self) -> tuple[str, ...]:
        """The texts in the order in which `check_proof` takes their verdicts."""
        return (self.fires, *self.ordinary)
