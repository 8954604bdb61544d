"""The guardrails of a server at work: which rule may act on which row, and what each rule read there.

Guardrails on one hook point of one layer are one `Guard` and one pass over its features; others are guards of
their own. Every gate reads every row. A rule acts on the rows whose request it serves, if its action is not `monitor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saeguard.choices import Action
from saeguard.guardrail import Guardrail, merge
from saeguard.online.intervention import Guard, attach
from saeguard.online.sequences import RuleTrack, Track
from saeguard.online.verdicts import Verdict, verdicts
from saeguard.rule import Rule

if TYPE_CHECKING:
    from transformers import Cache

Chosen = frozenset[str] | None
"""Ids of the guardrails that act on a row; None: all."""


@dataclass(frozen=True)
class Reading:
    """What one rule of the guardrail `id` read in a sequence: its verdict, the tokens read, how many of them were hot
    (a selected feature active) and how many were clamped."""

    id: str
    action: Action
    verdict: Verdict
    tokens: int
    hot: int
    clamped: int


@dataclass(frozen=True)
class TokenReading:
    """What one rule of the guardrail `id` knew after a token: whether the token is hot, the statistic and the decision
    so far, and the ids of the selected features that are active there."""

    id: str
    rule: str
    hot: bool
    statistic: float
    triggered: bool
    features: tuple[int, ...]


@dataclass(frozen=True)
class _Place:
    """A rule of a merged guardrail, and the id of the guardrail it came from."""

    id: str
    rule: Rule


class Guards:
    """Guards on one model, and which guardrail each of their rules belongs to."""

    def __init__(self, guards: Sequence[tuple[Guard, Sequence[_Place]]]) -> None:
        self._guards = tuple(guards)

    def arm(self, rows: Sequence[Chosen]) -> None:
        """Say which guardrails act on each row of the next pass."""
        for guard, places in self._guards:
            allowed = [[chosen is None or place.id in chosen for place in places] for chosen in rows]
            guard.clamping = torch.tensor(allowed)

    def refused(self, cache: Cache, rows: Sequence[Chosen]) -> list[bool]:
        """Which rows of the cache a rule of the action `refuse` has triggered on."""
        refused = [False] * len(rows)
        for guard, places in self._guards:
            if all(place.rule.action != "refuse" for place in places):
                continue
            track = guard.track(cache, len(rows))
            for record, place in zip(track.rules, places, strict=True):
                if place.rule.action == "refuse":
                    hit = (record.triggered & track.attended).any(dim=1).tolist()
                    refused = [
                        old or (new and (chosen is None or place.id in chosen))
                        for old, new, chosen in zip(refused, hit, rows, strict=True)
                    ]
        return refused

    def readings(self, cache: Cache, rows: int, row: int, chosen: Chosen) -> tuple[Reading, ...]:
        """What the chosen guardrails read in one row of a cache of that many rows."""
        found: list[Reading] = []
        for guard, places in self._guards:
            track = guard.track(cache, rows).map(lambda part: part[row : row + 1])
            its = verdicts(track, [place.rule for place in places])[0]
            for index, (place, verdict) in enumerate(zip(places, its, strict=True)):
                if chosen is None or place.id in chosen:
                    found.append(_reading(place, verdict, track, index, [len(p.rule.selected) for p in places]))
        return tuple(found)

    def trace(self, cache: Cache, rows: int, row: int, attended: Tensor) -> list[tuple[TokenReading, ...]]:
        """What every rule, chosen or not, read in the last tokens of one row, at those that are attended."""
        columns: list[list[TokenReading]] = []
        for guard, places in self._guards:
            last = guard.track(cache, rows).map(lambda part: part[row, -len(attended) :][attended.to(part.device)])
            widths = [len(place.rule.selected) for place in places]
            for place, record, active in zip(places, last.rules, torch.split(last.active, widths, dim=1), strict=True):
                columns.append(_token_readings(place, record, active))
        return list(zip(*columns, strict=True))


def _token_readings(place: _Place, record: RuleTrack, active: Tensor) -> list[TokenReading]:
    """Of one rule, from its record and its active features (tokens, n)."""
    name, ids = place.rule.name.removeprefix(f"{place.id}/"), torch.tensor(place.rule.features)
    active = active.cpu()
    hot = (active & place.rule.gate.clamped(len(ids))).any(dim=1).tolist()
    known = zip(hot, record.statistics.tolist(), record.triggered.tolist(), active, strict=True)
    return [
        TokenReading(place.id, name, is_hot, statistic, triggered, tuple(ids[on].tolist()))
        for is_hot, statistic, triggered, on in known
    ]


def _reading(place: _Place, verdict: Verdict, track: Track, index: int, widths: Sequence[int]) -> Reading:
    active = torch.split(track.active[0], list(widths), dim=1)[index]
    hot = (active & place.rule.gate.clamped(widths[index]).to(active.device)).any(dim=1)
    clamped = hot & track.rules[index].clamped[0]
    verdict = replace(verdict, rule=verdict.rule.removeprefix(f"{place.id}/"))
    return Reading(place.id, place.rule.action, verdict, int(track.attended.sum()), int(hot.sum()), int(clamped.sum()))


@contextmanager
def attached(
    guardrails: Sequence[tuple[str, Guardrail]], model: nn.Module, tokenizer: Any, *, normalise: bool = False
) -> Iterator[Guards]:
    """Guard `model` with all of them, by id, inside the block. Raises before a hook is placed if one does not fit."""
    by_point: dict[tuple[int, str, str], list[tuple[str, Guardrail]]] = {}
    for name, guardrail in guardrails:
        guardrail.check(model, tokenizer)
        by_point.setdefault((guardrail.layer, guardrail.hook, guardrail.hook_out), []).append((name, guardrail))
    with ExitStack() as stack:
        guards = []
        for group in by_point.values():
            named = [(name, _prefixed(name, guardrail)) for name, guardrail in group]
            guard = stack.enter_context(
                attach(merge([guardrail for _, guardrail in named]), model, tokenizer, normalise=normalise)
            )
            guards.append((guard, [_Place(name, rule) for name, guardrail in named for rule in guardrail.rules]))
        yield Guards(guards)


def _prefixed(name: str, guardrail: Guardrail) -> Guardrail:
    """With the id in front of its rules' names: two guardrails may each have a rule of one name."""
    return replace(guardrail, rules=tuple(replace(rule, name=f"{name}/{rule.name}") for rule in guardrail.rules))
