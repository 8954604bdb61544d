"""All attacks by name, and which of them can be made with what there is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from saeguard.attacks import dilution, rewriting, spelling, steering, steering_each, suffix, templates, turns
from saeguard.attacks.attack import Attack
from saeguard.attacks.config import FAMILIES, AttackConfig
from saeguard.attacks.materials import Materials
from saeguard.attacks.relearning import FAMILY, RELEARNING
from saeguard.attacks.suffix import Bounds
from saeguard.errors import UsageError
from saeguard.evaluation.endpoint import ChatEndpoint
from saeguard.evaluation.subject import Loader
from saeguard.guardrail import Guardrail

ALL = "all"
WHITE_BOX = {
    **dict.fromkeys(("hook-removed", "quantised-8", "quantised-4"), "weights"),
    **dict.fromkeys((*steering.SAYS, *steering_each.SAYS), "activations"),
    **dict.fromkeys(("lens", "probe"), "reading"),
}
"""Attacks on a guardrail that are no change of prompts; relearning is none either, and is of checkpoints too."""


def prompt_attacks(
    materials: Materials,
    config: AttackConfig,
    kept: Path,
    *,
    endpoint: ChatEndpoint | None = None,
    searched: tuple[Loader, Guardrail] | None = None,
) -> list[Attack]:
    """Every attack that changes prompts; token search where there is a guardrail to search against."""
    found = [
        *dilution.attacks(materials, config.lengths),
        *turns.attacks(materials),
        *spelling.attacks(),
        *rewriting.attacks(endpoint, config.languages, kept),
        *templates.attacks(materials),
    ]
    if searched is not None:
        found += suffix.attacks(*searched, Bounds(config.steps, config.seconds), kept)
    return found


def every_name(config: AttackConfig) -> dict[str, str]:
    """The family of each attack by its name, those that something is lacking for too."""
    found = {attack.name: attack.family for attack in prompt_attacks(Materials(), config, Path())}
    found |= {f"suffix-{place}": "suffix" for place in suffix.PLACES}
    return {**found, **WHITE_BOX, **dict.fromkeys(RELEARNING, FAMILY)}


def wanted(names: Sequence[str], config: AttackConfig) -> frozenset[str]:
    """Names of attacks from names of attacks and families. Raises `UsageError`."""
    every = every_name(config)
    found: set[str] = set()
    for name in names:
        its = {one for one, family in every.items() if name in (one, family, ALL)}
        if not its:
            raise UsageError(f"there is no attack {name}: saeguard attack --list names them; families are "
                             f"{', '.join(FAMILIES)}, and `all` is all")  # fmt: skip
        found |= its
    return frozenset(found)


def lacking(attack: Attack, materials: Materials, endpoint: ChatEndpoint | None) -> str | None:
    """What an attack needs and there is not."""
    if attack.needs == "an endpoint" and endpoint is None:
        return "it needs a language model: --endpoint URL"
    return f"it needs {attack.needs}" if materials.lack(attack.needs) else None
