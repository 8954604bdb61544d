"""The operator's guardrails and prompt gates: where they are, what they are called, what each does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_args

from saeguard.baselines import prompt_gate
from saeguard.baselines.prompt_gate import PromptGate
from saeguard.choices import Action, PromptAction
from saeguard.errors import UsageError
from saeguard.guardrail import Guardrail
from saeguard.rule import Rule
from saeguard.serving.config import ServeConfig

Served = Guardrail | PromptGate
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def load_guardrails(sources: Sequence[str], actions: Sequence[str]) -> dict[str, Served]:
    """Guardrails and prompt gates by id, from `DIR` (the id is the folder's name) or `ID=DIR`.

    Actions are given as `ID=ACTION`. Raises `UsageError`, and an `ArtifactError` for a folder that cannot be used.
    """
    named: dict[str, str] = {}
    for source in sources:
        name, equals, folder = source.partition("=")
        name, folder = (name, folder) if equals else (Path(source).name, source)
        if not ID.fullmatch(name) or not folder:
            raise UsageError(
                f"--guardrail {source}: expected DIR or ID=DIR, the id of letters, digits, '.', '_' and '-'"
            )
        if name in named:
            raise UsageError(f"--guardrail {source}: the id {name} is taken. Choose another with ID=DIR")
        named[name] = folder
    chosen = _actions(actions, named)
    loaded = {name: prompt_gate.load(folder) for name, folder in named.items()}
    return {name: _acting(name, its, chosen.get(name)) for name, its in loaded.items()}


def rules_of(served: Served) -> tuple[Rule | PromptGate, ...]:
    """What decides, each on its own: the rules of a guardrail, or the one prompt gate."""
    return served.rules if isinstance(served, Guardrail) else (served,)


def check_playground(config: ServeConfig, keys: Sequence[bytes]) -> None:
    """Raises `UsageError` for a playground that anyone on the network could enter."""
    if config.playground and not keys and not _loopback(config.host):
        raise UsageError(
            f"--playground lets requests do without the guardrails, and anyone may ask at {config.host}. "
            "Give keys with --api-keys-file, or listen on 127.0.0.1."
        )


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _actions(pairs: Sequence[str], ids: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, action = pair.partition("=")
        if name not in ids or not equals:
            raise UsageError(f"--action {pair}: expected ID=ACTION, with an id of {', '.join(ids) or 'no guardrail'}")
        found[name] = action
    return found


def _acting(name: str, served: Served, action: Any) -> Served:
    if action is None:
        return served
    possible = _possible(served)
    if action not in possible:
        raise UsageError(f"--action {name}={action}: expected an action of {', '.join(possible)}")
    if isinstance(served, PromptGate):
        return replace(served, action=action)
    return replace(served, rules=tuple(replace(rule, action=action) for rule in served.rules))


def _possible(served: Served) -> tuple[str, ...]:
    """The actions that an operator may choose for this; a prompt gate corrupts if it was fitted for that."""
    if isinstance(served, Guardrail):
        return get_args(Action)
    return tuple(action for action in get_args(PromptAction) if action != "corrupt" or served.strength > 0)
