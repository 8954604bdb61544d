"""A forward pass on its way through a guarded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import Cache

from saeguard.online.rereading import Reading
from saeguard.online.sequences import Track


@dataclass(eq=False)
class Again:
    """A second reading by the guard `reader`, of some `rows` (k,) of the batch (of so many rows) that `cache` holds;
    they are `first_rows` of the batch that came first, where this is a reading within another.

    The reader clamps as in `wanted`, a guard in front of it as it has noted. Those `behind` see other values than
    before, and so read anew. `whole`: nothing but what follows the last token is looked at.
    """

    reader: object
    wanted: Track
    rows: Tensor
    first_rows: Tensor
    batch: int
    cache: Cache | None
    whole: bool
    behind: bool = False


READ_AGAIN: ContextVar[Again | None] = ContextVar("saeguard_read_again", default=None)
ONLY_THE_LAST: ContextVar[bool] = ContextVar("saeguard_only_the_last", default=False)
"""Whether nothing but what is known after the last token of a pass is looked at."""


@contextmanager
def only_the_last() -> Iterator[None]:
    """In the block, passes are read for what is known after their last token: a sequence that has triggered by then is
    clamped from its first token on in the very pass."""
    token = ONLY_THE_LAST.set(True)
    try:
        yield
    finally:
        ONLY_THE_LAST.reset(token)


@contextmanager
def reading_again(again: Again) -> Iterator[None]:
    """In the block, passes are of this second reading."""
    token = READ_AGAIN.set(again)
    try:
        yield
    finally:
        READ_AGAIN.reset(token)


@dataclass(frozen=True)
class Pass:
    """One forward pass: ids and attention (batch, tokens), the track of what came before, which rules (batch, rules)
    have triggered already, the second reading that it is and what is `known` of its rows, the caches that will hold it,
    how far it has come, what is known after it, and the clamp's change that is still to be applied, with where.
    `outer`: the pass for which this is a second reading."""

    reading: Reading
    ids: Tensor
    attended: Tensor
    track: Track | None
    presumed: Tensor | None = None
    again: Again | None = None
    known: Track | None = None
    caches: tuple[Cache, ...] = ()
    stage: Literal["begun", "in the layer", "seen", "written"] = "begun"
    record: Track | None = None
    change: tuple[Tensor, Tensor] | None = None
    outer: Pass | None = None

    @property
    def whole(self) -> bool:
        """Whether what follows the last token is all that is looked at."""
        if self.again is not None:
            return self.again.whole
        return ONLY_THE_LAST.get() or self.reading.wants_only_the_last

    @property
    def started(self) -> Tensor:
        if self.track is None:
            return torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        return self.track.started

    def with_new(self, new: Track) -> Track:
        """What is known once the tokens of the pass are."""
        return new if self.track is None else self.track.followed_by(new)

    def on(self, device: torch.device) -> Pass:
        """The same with its ids, masks and tracks on the device of the guarded layer, where tracks mostly lie."""
        if all(its is None or its.ids.device == device for its in (self, self.track, self.known)):
            return self
        track, known = (
            None if its is None else its.map(lambda part: part.to(device)) for its in (self.track, self.known)
        )
        return replace(self, ids=self.ids.to(device), attended=self.attended.to(device), track=track, known=known)
