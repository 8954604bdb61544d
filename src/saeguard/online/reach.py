"""How far back a trigger reaches: which tokens of a sequence are to be held as clamped, and which sequences are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def stale(self, track: Track, allowed: Tensor | None) -> Tensor:
        """Rows (batch,) that a cache holds otherwise than they are to be read: in front of a trigger as if there were
        none, or as if there were one that was taken back."""
        if not self._back:
            return torch.zeros_like(track.attended[:, 0])
        held = torch.stack([track.rules[i].clamped for i in self._back], dim=-1)
        differs = (held != self._reached(track, allowed, slice(-1, None))).any(dim=-1)
        return (differs & track.attended).any(dim=1)

    def readings(
        self, track: Track, tokens: int, allowed: Tensor | None, *, whole: bool
    ) -> Iterator[tuple[Tensor, Track, Tensor]]:
        """The second readings that the last `tokens` call for: of which rows (k,), their track then, and whose output
        (k, tokens) it is. The last reading of a row is what a cache is to hold; the tokens before these are held as
        they were to be read.

        Each further rule that triggers calls for another, since it reaches back from its own trigger; if the `whole`
        pass is read for what follows its last token, the last one will do.
        """
        if track.length > tokens and not self._further(track, tokens):
            return
        stale = self.stale(track, allowed)
        if not bool(stale.any()):
            return
        reached = self._reached(track, allowed, slice(None))
        count = reached.sum(dim=-1)
        now, last = count[:, -tokens:], count[:, -1]
        before = count[:, -tokens - 1] if track.length > tokens else torch.zeros_like(last)
        for level in sorted({*now.flatten().tolist()}):
            due = (last == level) | ((now == level).any(dim=1) & (before < level) & (not whole))
            rows = (stale & due).nonzero()[:, 0]
            if len(rows):
                first = (count[rows] >= level).int().argmax(dim=1)
                yield rows, self._clamping(track.of(rows), reached[rows, first]), now[rows] >= level

    def _further(self, track: Track, tokens: int) -> bool:
        """Whether one of them has triggered on some row in the last tokens: without, nothing is to be read again."""
        its = [track.rules[i].triggered for i in self._back]
        return not all(torch.equal(each[:, -1], each[:, -tokens - 1]) for each in its)

    def _clamping(self, track: Track, clamped: Tensor) -> Track:
        """A track once these rules (batch, rules) clamp all of it."""
        rules = list(track.rules)
        for place, i in enumerate(self._back):
            rules[i] = replace(rules[i], clamped=clamped[:, place, None].expand_as(rules[i].clamped))
        return replace(track, rules=tuple(rules))

    def _reached(self, track: Track, allowed: Tensor | None, tokens: slice) -> Tensor:
        """Which of them (batch, tokens, rules) have triggered by each of these tokens."""
        found = torch.stack([track.rules[i].triggered[:, tokens] for i in self._back], dim=-1)
        return found if allowed is None else found & allowed[:, None, self._back].to(found.device)
