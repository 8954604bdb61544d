"""The guardrails of a server at work: which rule may act on which row, and what each rule read there.

Guardrails on one hook point of one layer are one `Guard` and one pass over its features; others are guards of
their own. Every gate reads every row. A rule acts on the rows whose request it serves, if its action is not `monitor`.
A prompt gate judges a row once, in the pass that reads its prompt; the row carries that reading from then on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from saeguard.baselines.prompt_gate import PromptGate, PromptGuard
from saeguard.choices import Action, PromptAction
from saeguard.errors import UsageError
from saeguard.guardrail import Guardrail, merge
from saeguard.online.intervention import Guard, attach
from saeguard.online.sequences import RuleTrack, Track
from saeguard.online.verdicts import Verdict, verdicts
from saeguard.rule import Rule
from saeguard.serving.policy import Served

if TYPE_CHECKING:
    from transformers import Cache

Chosen = frozenset[str] | None
"""Ids of the guardrails that act on a row; None: all."""


@dataclass(frozen=True)
class Reading:
    """What one rule of the guardrail `id` read in a sequence: its verdict, the tokens read, how many of them were hot
    (a selected feature active; None: it looks at no features) and how many were clamped."""

    id: str
    action: Action | PromptAction
    verdict: Verdict
    tokens: int
    hot: int | None
    clamped: int

    @property
    def refuses(self) -> bool:
        """Whether the answer is the refusal."""
        return self.action == "refuse" and self.verdict.triggered


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


R = TypeVar("R", Reading, TokenReading)
AtPrompt = tuple[Reading, ...]
"""What every prompt gate read in the prompt of a row."""


class Guards:
    """Guards on one model, and which guardrail each of their rules belongs to. Readings come in the order of `ids`."""

    def __init__(
        self, ids: Sequence[str], guards: Sequence[tuple[Guard, Sequence[_Place]]],
        prompts: Sequence[tuple[str, PromptGate, PromptGuard]],
    ) -> None:  # fmt: skip
        self._guards, self._prompts = tuple(guards), tuple(prompts)
        self._order = {name: place for place, name in enumerate(ids)}

    def arm(self, rows: Sequence[Chosen]) -> None:
        """Say which guardrails act on each row of the next pass."""
        for guard, places in self._guards:
            guard.clamping = torch.tensor([[_serves(chosen, place.id) for place in places] for chosen in rows])
        for name, _, prompts in self._prompts:
            prompts.acting = [_serves(chosen, name) for chosen in rows]

    def at_prompts(self, tokens: Sequence[int]) -> list[AtPrompt]:
        """What the prompt gates read in the last pass, of prompts of so many tokens."""
        return [
            tuple(
                Reading(name, gate.action, guard.verdicts[row], count, None, 0) for name, gate, guard in self._prompts
            )
            for row, count in enumerate(tokens)
        ]

    def refused(self, cache: Cache, rows: Sequence[Chosen], at_prompts: Sequence[AtPrompt]) -> list[bool]:
        """Which rows of the cache a rule of the action `refuse` has triggered on."""
        refused = [
            any(reading.refuses and _serves(chosen, reading.id) for reading in its)
            for chosen, its in zip(rows, at_prompts, strict=True)
        ]
        for guard, places in self._guards:
            if all(place.rule.action != "refuse" for place in places):
                continue
            track = guard.track(cache, len(rows))
            for record, place in zip(track.rules, places, strict=True):
                if place.rule.action == "refuse":
                    hit = (record.triggered & track.attended).any(dim=1).tolist()
                    refused = [
                        old or (new and _serves(chosen, place.id))
                        for old, new, chosen in zip(refused, hit, rows, strict=True)
                    ]
        return refused

    def readings(self, cache: Cache, rows: int, row: int, chosen: Chosen, at_prompt: AtPrompt) -> tuple[Reading, ...]:
        """What the chosen guardrails read in one row of a cache of that many rows."""
        found = list(at_prompt)
        for guard, places in self._guards:
            track = guard.track(cache, rows).map(lambda part: part[row : row + 1])
            widths = [len(place.rule.selected) for place in places]
            its = verdicts(track, [place.rule for place in places])[0]
            found += [
                _reading(place, verdict, track, index, widths)
                for index, (place, verdict) in enumerate(zip(places, its, strict=True))
            ]
        return tuple(self._ordered(reading for reading in found if _serves(chosen, reading.id)))

    def trace(
        self, cache: Cache, rows: int, row: int, attended: Tensor, at_prompt: AtPrompt
    ) -> list[tuple[TokenReading, ...]]:
        """What every rule, chosen or not, read in the last tokens of one row, at those that are attended."""
        tokens = int(attended.sum())
        columns = [[_of_prompt(reading)] * tokens for reading in at_prompt]
        for guard, places in self._guards:
            last = guard.track(cache, rows).map(lambda part: part[row, -len(attended) :][attended.to(part.device)])
            widths = [len(place.rule.selected) for place in places]
            for place, record, active in zip(places, last.rules, torch.split(last.active, widths, dim=1), strict=True):
                columns.append(_token_readings(place, record, active))
        return [tuple(self._ordered(column[token] for column in columns)) for token in range(tokens)]

    def _ordered(self, readings: Iterable[R]) -> list[R]:
        return sorted(readings, key=lambda reading: self._order[reading.id])


def _serves(chosen: Chosen, name: str) -> bool:
    return chosen is None or name in chosen


def _of_prompt(reading: Reading) -> TokenReading:
    """At any token: a prompt gate has decided on the whole prompt before the first."""
    verdict = reading.verdict
    return TokenReading(reading.id, verdict.rule, False, verdict.statistic, verdict.triggered, ())


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
    served: Sequence[tuple[str, Served]], model: nn.Module, tokenizer: Any, *, normalise: bool = False
) -> Iterator[Guards]:
    """Guard `model` with all of them, by id, inside the block. Raises before a hook is placed if one does not fit.

    Prompt gates come first, so that what a guard reads beside a prompt is no prompt to them.
    """
    guardrails = [(name, its) for name, its in served if isinstance(its, Guardrail)]
    gates = [(name, its) for name, its in served if isinstance(its, PromptGate)]
    _check(guardrails, gates, model, tokenizer)
    by_point: dict[tuple[int, str, str], list[tuple[str, Guardrail]]] = {}
    for name, guardrail in guardrails:
        by_point.setdefault((guardrail.layer, guardrail.hook, guardrail.hook_out), []).append((name, guardrail))
    with ExitStack() as stack:
        prompts = [(name, gate, stack.enter_context(gate.attach(model, tokenizer))) for name, gate in gates]
        guards = []
        for group in by_point.values():
            named = [(name, _prefixed(name, guardrail)) for name, guardrail in group]
            guard = stack.enter_context(
                attach(merge([guardrail for _, guardrail in named]), model, tokenizer, normalise=normalise)
            )
            guards.append((guard, [_Place(name, rule) for name, guardrail in named for rule in guardrail.rules]))
        yield Guards([name for name, _ in served], guards, prompts)


def _check(
    guardrails: Sequence[tuple[str, Guardrail]], gates: Sequence[tuple[str, PromptGate]], model: nn.Module,
    tokenizer: Any,
) -> None:  # fmt: skip
    for _, guardrail in guardrails:
        guardrail.check(model, tokenizer)
    if guardrails and (corrupting := [name for name, gate in gates if gate.action == "corrupt"]):
        raise UsageError(
            f"the prompt gate {corrupting[0]} corrupts prompts, and guardrail {guardrails[0][0]} would read them "
            f"corrupted, not as it was calibrated. Serve one of the two, or: --action {corrupting[0]}=refuse"
        )


def _prefixed(name: str, guardrail: Guardrail) -> Guardrail:
    """With the id in front of its rules' names: two guardrails may each have a rule of one name."""
    return replace(guardrail, rules=tuple(replace(rule, name=f"{name}/{rule.name}") for rule in guardrail.rules))
