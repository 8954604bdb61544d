"""Whose tokens are whose: the requests of a step, and the place of each in the guard's memory.

An engine with continuous batching packs tokens of many requests into one (tokens, d_model) block: whole prompts,
chunks of prompts, single generated tokens. A request is read in order. It may start over (preemption drops its
KV cache), but it never skips tokens: a request that does was computed elsewhere, unseen by the guard.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from saeguard.errors import AttachError

NOBODY = 0
"""The slot of rows that belong to no request, such as padding."""


@dataclass(frozen=True)
class Span:
    """Rows `start` to `start + length` of a step: the tokens of a request from `position` on."""

    slot: int
    start: int
    length: int
    position: int


class Slots:
    """Gives each request a slot from 1 to `room`, and follows how many of its tokens were read.

    Where all are taken, the request that has waited longest loses its slot. It was preempted and will start over:
    an engine never runs more requests at once than there are slots.
    """

    def __init__(self, room: int) -> None:
        self._free = list(range(room, NOBODY, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._read: dict[str, int] = {}

    def begin(self, requests: Sequence[tuple[str, int, int]]) -> list[Span]:
        """The spans of a step, in row order, from (request, position of its first token here, number of tokens).

        Raises `AttachError` for a request of which tokens went by unseen.
        """
        for request, _, _ in requests:
            if request in self._slots:
                self._slots.move_to_end(request)
        spans, row = [], 0
        for request, position, length in requests:
            read = self._read.get(request, 0)
            if position not in (0, read):
                raise AttachError.mismatch(
                    f"next token of request {request}", found=f"number {position}", expected=f"number {read}",
                    fix="Its other tokens were computed where no guard saw them (prefix cache, KV transfer, "
                    "speculative decoding): switch that off.",
                )  # fmt: skip
            spans.append(Span(self._slot(request), row, length, position))
            self._read[request] = position + length
            row += length
        return spans

    def find(self, request: str) -> int | None:
        """The slot of a live request."""
        return self._slots.get(request)

    def live(self) -> tuple[str, ...]:
        """The requests that have a slot."""
        return tuple(self._slots)

    def finish(self, requests: Iterable[str]) -> None:
        """Free the slots of requests that are done; those without one are passed over."""
        for request in requests:
            self._read.pop(request, None)
            if (slot := self._slots.pop(request, None)) is not None:
                self._free.append(slot)

    def _slot(self, request: str) -> int:
        if request not in self._slots:
            if not self._free:
                self.finish([next(iter(self._slots))])
            self._slots[request] = self._free.pop()
        return self._slots[request]
