"""Dilution: filler before the question, after it, or both, so that what a gate reads is mostly something else."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Literal

from saeguard.attacks.attack import ANSWER, Attack, Change, Need, Prompt, quiz
from saeguard.attacks.materials import Kind, Materials
from saeguard.evaluation.mcq import PROMPT, Question

Place = Literal["before", "after", "both"]
PLACES: tuple[tuple[Place, Kind], ...] = (
    ("before", "ordinary"), ("before", "near"), ("before", "neutral"), ("after", "ordinary"), ("both", "ordinary"),
)  # fmt: skip
NEEDS: dict[Kind, Need] = {"ordinary": "far texts", "near": "near texts"}


def attacks(materials: Materials, lengths: Sequence[int]) -> list[Attack]:
    """Each place and kind of filler at each length in tokens."""
    return [
        Attack(
            f"dilution-{place}-{kind}-{tokens}", "dilution",
            f"{tokens} tokens of {kind} text {'before and after' if place == 'both' else place} the question",
            _change(materials, place, kind, tokens), tokens, NEEDS.get(kind), _before(place, tokens),
        )
        for place, kind in PLACES
        for tokens in lengths
    ]  # fmt: skip


def _before(place: Place, tokens: int) -> int:
    """How many of the tokens stand before the question."""
    return {"before": tokens, "after": 0, "both": tokens // 2}[place]


def _change(materials: Materials, place: Place, kind: Kind, tokens: int) -> Change:
    def change(question: Question, draw: Random) -> Prompt:
        if not tokens:
            return quiz(question.text)
        before = _before(place, tokens)
        first, last = (materials.filler(kind, n, draw) if n else "" for n in (before, tokens - before))
        text = PROMPT.format(question=question.text)
        if last:
            text = f"{text.removesuffix(ANSWER)}\n{last}\n\n{ANSWER}"
        return Prompt(f"{first}\n\n{text}" if first else text)

    return change
