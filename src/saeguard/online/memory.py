"""What a guard remembers from pass to pass: the tracks that lie on the caches, and that of the last pass."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

import torch
from torch import Tensor
from transformers import Cache

from saeguard.online.passes import READ_AGAIN, Again, Pass
from saeguard.online.sequences import Track, recall, remember


class Memory:
    """The tracks of one guard."""

    def __init__(self) -> None:
        self._key = uuid4().hex
        self._tracks: dict[str, Track] = {}

    @property
    def last(self) -> Track | None:
        """The track of the last pass, which follows the cache that it lies on."""
        return self._tracks.get(self._key)

    def put_aside(self) -> dict[str, Track]:
        """Forget the last pass. What is returned can be given to `take_up`."""
        before, self._tracks = self._tracks, {}
        return before

    def take_up(self, before: dict[str, Track]) -> None:
        """Make the last pass what it was."""
        self._tracks = before

    def recall(self, kv: Cache | None, rows: int) -> Track | None:
        """The track of a cache, None for an empty one. Raises `AttachError` for tokens that were not seen."""
        return recall(kv, self._key, rows)

    def keep(self, track: Track, caches: Sequence[Cache]) -> None:
        """Remember a track as that of the last pass, and on its caches."""
        self._tracks = {self._key: track}
        for kv in caches:
            self._tracks = remember(kv, self._key, track)

    def see(self, new: Track, now: Pass) -> None:
        """Remember what was seen of a pass."""
        again = READ_AGAIN.get()
        if again is None:
            self.keep(new if now.track is None else now.track.followed_by(new), now.caches)
        elif now.decided is not None:
            again.behind = True
        elif again.behind:
            self._see_again(new, now, again)

    def _see_again(self, new: Track, now: Pass, again: Again) -> None:
        """On the cache of the second reading, which takes it to the one that it is of."""
        for kv in now.caches:
            remember(kv, self._key, new)
        if not now.caches and self.last is not None:
            self.keep(self.last.with_rows(again.rows, new), ())

    def at_the_start(self, again: Again) -> Tensor | None:
        """Which rules (k, rules) had triggered with the first token of the rows that are read again."""
        track = self.last if again.cache is None else self.recall(again.cache, again.batch)
        if track is None:
            return None
        its = track.map(lambda part: part[again.rows.to(part.device)])
        first = its.attended.int().argmax(dim=1, keepdim=True)
        return torch.cat([rule.triggered.gather(1, first.to(rule.triggered.device)) for rule in its.rules], dim=1)
