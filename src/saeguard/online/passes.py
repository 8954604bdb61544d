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


@dataclass
class Again:
    """A second reading by one of the guards on a model, of some rows (k,) of a batch that `cache` holds.

    All of them then clamp the whole pass, and none starts another. Those `behind` the one that reads see other values
    than before, and so remember what they see now.
    """

    rows: Tensor
    batch: int
    cache: Cache | None
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


@dataclass(frozen=True)
class Pass:
    """One forward pass: ids and attention (batch, tokens), the track of what came before, which rules (batch, rules)
    have triggered already, of rows that are read again which tokens (batch, tokens, rules) are clamped, the caches that
    will hold it, how far it has come, and the clamp's change that is still to be applied, with where. `outer`: the pass
    for which another guard reads again in this one."""

    reading: Reading
    ids: Tensor
    attended: Tensor
    track: Track | None
    presumed: Tensor | None = None
    decided: Tensor | None = None
    caches: tuple[Cache, ...] = ()
    stage: Literal["begun", "in the layer", "seen", "written"] = "begun"
    change: tuple[Tensor, Tensor] | None = None
    outer: Pass | None = None

    @property
    def whole(self) -> bool:
        """Whether what follows the last token is all that is looked at."""
        return READ_AGAIN.get() is not None or ONLY_THE_LAST.get() or self.reading.wants_only_the_last

    @property
    def started(self) -> Tensor:
        if self.track is None:
            return torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        return self.track.started

    def on(self, device: torch.device) -> Pass:
        """The same with its ids and masks on the device of the guarded layer."""
        track = None if self.track is None else self.track.map(lambda part: part.to(device))
        return replace(self, ids=self.ids.to(device), attended=self.attended.to(device), track=track)
