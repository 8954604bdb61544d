"""What a guard remembers from pass to pass: the tracks that lie on the caches, and that of the last pass."""

from __future__ import annotations

from uuid import uuid4

import torch
from torch import Tensor
from transformers import Cache

from saeguard.online.passes import Again, Pass
from saeguard.online.sequences import Track, recall, remember


class Memory:
    """The tracks of one guard."""

    def __init__(self) -> None:
        self._key = uuid4().hex
        self._tracks: dict[str, Track] = {}
        self._left: tuple[Track, Tensor | None] | None = None

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

    def keep(self, track: Track, now: Pass) -> None:
        """Remember a track as that of a pass. That of a second reading lies on its cache, which takes it to the one
        that it is of; where there is none, it takes the place of those rows at once."""
        if now.again is None:
            self._tracks = {self._key: track}
            for kv in now.caches:
                self._tracks = remember(kv, self._key, track)
        elif now.caches:
            for kv in now.caches:
                remember(kv, self._key, track)
        elif self.last is not None:
            self._tracks = {self._key: self.last.with_rows(now.again.first_rows, track)}

    def of(self, again: Again) -> Track | None:
        """What is known of the rows that are read again."""
        if again.cache is not None:
            track, rows = self.recall(again.cache, again.batch), again.rows
        else:
            track, rows = self.last, again.first_rows
        return None if track is None else track.of(rows)

    def leave(self, track: Track, allowed: Tensor | None) -> None:
        """Note what the last pass has left, and which rules could clamp which rows (rows, rules)."""
        self._left = track, None if allowed is None else allowed.clone()

    def is_as_left(self, track: Track, allowed: Tensor | None) -> bool:
        """Whether the last pass left this very track, and the same rules may clamp now. A cache that was changed in any
        way, or some of whose rows were read again, holds another."""
        if self._left is None or self._left[0] is not track:
            return False
        before = self._left[1]
        return before is allowed if before is None or allowed is None else torch.equal(before, allowed)
