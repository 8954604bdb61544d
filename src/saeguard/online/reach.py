"""How far back a trigger reaches: which tokens of a sequence are to be held as clamped, and which sequences are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saeguard.online.sequences import Track
from saeguard.rule import Rule


class Reach:
    """Of the rules of a guardrail, those that reach back. `allowed` (batch, rules): which may clamp which rows."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._back = [i for i, rule in enumerate(rules) if rule.reaches_back]

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return bool(self._back)

    def wanted(self, track: Track, allowed: Tensor | None) -> Tensor:
        """Which of them (batch, tokens, rules) have triggered by each token."""
        return self._of([track.rules[i].triggered for i in self._back], allowed)

    def reached(self, track: Track, allowed: Tensor | None) -> Tensor:
        """Which of them (batch, 1, rules) have triggered by the last token."""
        return self._of([track.rules[i].triggered[:, -1:] for i in self._back], allowed)

    def stale(self, track: Track, allowed: Tensor | None) -> Tensor:
        """Rows (batch,) that a cache holds otherwise than they are to be read: in front of a trigger as if there were
        none, or as if there were one that was taken back."""
        if not self._back:
            return torch.zeros_like(track.attended[:, 0])
        held = torch.stack([track.rules[i].clamped for i in self._back], dim=-1)
        differs = (held != self.reached(track, allowed)).any(dim=-1)
        return (differs & track.attended).any(dim=1)

    def as_wanted(self, track: Track, allowed: Tensor | None) -> Track:
        """The track of the same tokens once none of its rows is stale."""
        last = self.reached(track, allowed)
        rules = list(track.rules)
        for place, i in enumerate(self._back):
            rules[i] = replace(rules[i], clamped=last[..., place].expand_as(rules[i].clamped))
        return replace(track, rules=tuple(rules))

    def _of(self, triggered: list[Tensor], allowed: Tensor | None) -> Tensor:
        found = torch.stack(triggered, dim=-1)
        return found if allowed is None else found & allowed[:, None, self._back].to(found.device)
