"""Verdicts: what the rules of a guardrail decided on each sequence, read from its track."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saeguard.online.sequences import RuleTrack, Track
from saeguard.rule import Rule


@dataclass(frozen=True)
class Verdict:
    """What one rule decided on one sequence.

    `statistic` is the largest so far (or the last, for a gate that decides by block); `first_token` is the index,
    counted from the sequence's first token, at which it triggered, else None; `features` are the ids of the
    selected features that were active, most frequent first.
    """

    rule: str
    statistic: float
    threshold: float
    triggered: bool
    first_token: int | None
    features: tuple[int, ...]


class Watch(Protocol):
    """What is asked of a guard at work, of whatever kind: about each sequence of the last pass, or prompt."""

    @property
    def verdicts(self) -> list[Verdict]:
        """What was decided."""

    @property
    def refusals(self) -> list[bool]:
        """Whether the answer is the refusal."""


def verdicts(track: Track, rules: Sequence[Rule]) -> list[list[Verdict]]:
    """For each row of a track, the verdict of every rule."""
    found: list[list[Verdict]] = []
    widths = [len(rule.selected) for rule in rules]
    for row in range(len(track.attended)):
        attended = track.attended[row].cpu()
        active = torch.split(track.active[row].sum(dim=0).cpu(), widths)
        found.append([
            _verdict(rule, _one_row(record, row), attended, counts)
            for rule, record, counts in zip(rules, track.rules, active, strict=True)
        ])  # fmt: skip
    return found


def _one_row(record: RuleTrack, row: int) -> RuleTrack:
    """(1, tokens) of one row, on the CPU."""
    return record.map(lambda part: part[row : row + 1].cpu())


def refused(rules: Sequence[Rule], its: Sequence[Verdict]) -> bool:
    """Whether a rule that refuses has triggered, of the verdicts of all rules on one sequence."""
    return any(rule.action == "refuse" and verdict.triggered for rule, verdict in zip(rules, its, strict=True))


def _verdict(rule: Rule, record: RuleTrack, attended: Tensor, counts: Tensor) -> Verdict:
    """The verdict of one row, (1, tokens) in `record`; padding triggers nothing, though a block decides for it too."""
    triggered = record.triggered[0, attended]
    order = counts.sort(descending=True, stable=True)
    return Verdict(
        rule=rule.name,
        statistic=float(rule.gate.sequence_statistic(record.statistics)),
        threshold=rule.threshold,
        triggered=bool(triggered.any()),
        first_token=int(triggered.float().argmax()) if bool(triggered.any()) else None,
        features=tuple(rule.features[i] for i, hits in zip(order.indices, order.values, strict=True) if hits > 0),
    )
