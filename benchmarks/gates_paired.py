"""Ways to gate compared over the topics of `gates.py`, text by text: for `windowed.py` and `chosen_features.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from gates_streams import FILLERS

from saeguard.calibration import Rate

PAIRED = ("passages", str(FILLERS[0]), str(FILLERS[-1]))
"""The texts that are compared: passages, and questions after the least and the most filler."""


@dataclass(frozen=True)
class Row:
    """What `gates.judge` found of one way on one topic, and which of the topic's test passages it catches."""

    found: Mapping[str, Any]
    passages: Sequence[bool]

    def texts(self, which: str) -> Sequence[bool]:
        """Which passages, or questions after so much filler, are caught."""
        caught: Sequence[bool] = self.passages if which == "passages" else self.found["questions"][int(which)]
        return caught

    @property
    def worst(self) -> float:
        """The rate of the corpus that triggers most."""
        return max(pair[1].value for pair in (self.found["near"], self.found["far"]) if pair)


def caught(rows: Sequence[Row], which: str) -> float:
    """The share of texts that are caught, over all topics."""
    return mean(hit for row in rows for hit in row.texts(which))


def against(rows: Sequence[Row], others: Sequence[Row], which: str) -> str:
    """Texts that only these catch, and only the others; in bold where the interval of the former share leaves out a
    half."""
    pairs = [
        pair for a, b in zip(rows, others, strict=True) for pair in zip(a.texts(which), b.texts(which), strict=True)
    ]
    more, less = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    low, high = Rate(more, more + less).interval
    text = f"+{more} -{less}"
    return text if low <= 0.5 <= high else f"**{text}**"


def alarms(found: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """False alarms in 1,000 tokens: mean over the corpora, and in the worst, as means over topics."""
    rates = [[1000 * count / tokens for count, tokens in its["false_alarms"].values()] for its in found]
    return mean(map(mean, rates)), mean(map(max, rates))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (columns, ["---"] * len(columns), *rows))
