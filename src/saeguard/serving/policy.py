"""The operator's guardrails: where they are, what they are called, what each does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import cast, get_args

from saeguard.choices import Action
from saeguard.errors import UsageError
from saeguard.guardrail import Guardrail
from saeguard.serving.config import ServeConfig

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def load_guardrails(sources: Sequence[str], actions: Sequence[str]) -> dict[str, Guardrail]:
    """Guardrails by id, from `DIR` (the id is the folder's name) or `ID=DIR`, with actions given as `ID=ACTION`.

    Raises `UsageError`, and an `ArtifactError` for a folder that cannot be used.
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
    loaded = {name: Guardrail.from_pretrained(folder) for name, folder in named.items()}
    return {name: _acting(guardrail, chosen.get(name)) for name, guardrail in loaded.items()}


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


def _actions(pairs: Sequence[str], ids: Mapping[str, str]) -> dict[str, Action]:
    found: dict[str, Action] = {}
    for pair in pairs:
        name, _, action = pair.partition("=")
        if name not in ids or action not in get_args(Action):
            raise UsageError(
                f"--action {pair}: expected ID=ACTION, with an id of {', '.join(ids)} "
                f"and an action of {', '.join(get_args(Action))}"
            )
        found[name] = cast(Action, action)
    return found


def _acting(guardrail: Guardrail, action: Action | None) -> Guardrail:
    if action is None:
        return guardrail
    return replace(guardrail, rules=tuple(replace(rule, action=action) for rule in guardrail.rules))
