"""From tokens to text as they come: whole characters only, and nothing of a stop string.

What is handed out, put together, is the text of all tokens up to the first stop string, however the tokens cut it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"


class Detokenizer:
    """Text of a growing list of tokens. Bytes of an unfinished character are held back."""

    def __init__(self, tokenizer: Any, *, special: bool = False) -> None:
        self._hides = not special
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context, self._sent = 0, 0  # tokens from `_context` on are decoded; those before `_sent` were handed out

    def push(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        new = self._unsent()
        if not new or new.endswith(INCOMPLETE):
            return ""
        self._context, self._sent = self._sent, len(self._ids)
        return new

    def finish(self) -> str:
        """What is left, with replacement characters for bytes that make no character."""
        return self._unsent()

    def _unsent(self) -> str:
        # Some tokenizers write a token differently at the start of a text, so it is decoded after the one before it.
        before = self._decode(self._ids[self._context : self._sent])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._hides, clean_up_tokenization_spaces=False))


class StopStrings:
    """Lets text through up to the first stop string; `stopped` says that it came."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that surely is not part of a stop string."""
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            _, start = min(found)
            return self._release(start)
        return self._release(len(self._held) - self._beginning())

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        return self._release(0 if self.stopped else len(self._held))

    def _beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        lengths = range(min(len(self._held), max(map(len, self._stops), default=1) - 1), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _release(self, characters: int) -> str:
        out, self._held = self._held[:characters], self._held[characters:]
        return out
