"""Traces: each token of a sequence as the gates saw it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from saeguard.serving.readings import TokenReading
from saeguard.serving.text import Detokenizer


class Tracer:
    """Turns the tokens of one sequence, as they are read, into rows for a client.

    A character that several tokens make is the text of the last of them; the others have none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._text = Detokenizer(tokenizer, special=True)
        self._special = frozenset(tokenizer.all_special_ids)

    def rows(self, tokens: Iterable[tuple[int, tuple[TokenReading, ...]]]) -> list[dict[str, Any]]:
        """A row for each token."""
        return [
            {
                "text": self._text.push(token),
                "special": token in self._special,
                "readings": [_reading(reading) for reading in readings],
            }
            for token, readings in tokens
        ]


def _reading(reading: TokenReading) -> dict[str, Any]:
    return {
        "id": reading.id,
        "rule": reading.rule,
        "hot": reading.hot,
        "statistic": reading.statistic if math.isfinite(reading.statistic) else None,
        "triggered": reading.triggered,
        "features": list(reading.features),
    }
