"""False alarms in text that goes on: how many in 1,000 tokens, and the threshold that keeps a promise of so many.

A promise for a window (alpha) says little of a conversation of 4,000 tokens, in which a gate has many chances. Long
text is simulated: the windows of a corpus one after another, in several orders, the gate starting anew after each
alarm. Simulated text has the token scores of the windows; in real text a token also sees what stood further back.
docs/gates.md counts alarms in real text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from saeguard.errors import TooFewSequencesError
from saeguard.gate import Accumulator

ORDERS = 4
BLOCK = 256
HALVINGS = 20
THOUSAND = 1000


@dataclass(frozen=True)
class Scored:
    """Token scores (tokens,) of a text, and which tokens are counted (tokens,)."""

    scores: Tensor
    counted: Tensor


@dataclass(frozen=True)
class FalseAlarms:
    """Mean number of alarms over the orders in which a corpus's windows were read, and its counted tokens."""

    alarms: float
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `per_1000` is the rate in 1,000 tokens."""
        rate = self.alarms * THOUSAND / self.tokens if self.tokens else 0.0
        return {"alarms": self.alarms, "tokens": self.tokens, "per_1000": rate}


def read_scored(accumulator: Accumulator, text: Scored) -> Tensor:
    """The statistic (tokens,) after each token."""
    return accumulator.advance(accumulator.start(1), text.scores[None], text.counted[None])[1][0]


def alarms(accumulator: Accumulator, text: Scored, threshold: float) -> int:
    """How often the gate triggers, starting anew after each time."""
    count, place, state = 0, 0, accumulator.start(1)
    while place < len(text.scores):
        part = slice(place, place + BLOCK)
        states, found = accumulator.advance(state, text.scores[None, part], text.counted[None, part])
        over = (found[0] > threshold).nonzero()
        if len(over):
            count, place, state = count + 1, place + int(over[0]) + 1, accumulator.start(1)
        else:
            place, state = place + BLOCK, states[:, -1]
    return count


def false_alarms(accumulator: Accumulator, windows: Sequence[Scored], threshold: float) -> FalseAlarms:
    """Alarms in the windows of one corpus, read as one text."""
    found = mean(alarms(accumulator, text, threshold) for text in _texts(windows))
    return FalseAlarms(found, _tokens(windows))


def long_run_bound(accumulator: Accumulator, windows: Sequence[Scored], rate: float, *, group: str) -> float:
    """The least threshold with at most `rate` false alarms in 1,000 tokens of these windows, one alarm added to those
    found for the text that is to come. Raises `TooFewSequencesError`."""
    tokens = _tokens(windows)
    allowed = rate * tokens / THOUSAND - 1
    if not allowed >= 0:  # also where the rate is not a number
        raise TooFewSequencesError.mismatch(
            f"calibration tokens of the retain corpus {group!r} for {rate} false alarms in 1,000 tokens",
            found=tokens,
            expected=f"at least {THOUSAND / rate:,.0f}" if rate > 0 else "a rate above 0",
            fix="Give more text, or allow more with --per-1000.",
        )
    texts = _texts(windows)
    low, high = 0.0, max(float(read_scored(accumulator, text).amax()) for text in texts)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if mean(alarms(accumulator, text, middle) for text in texts) <= allowed:
            high = middle
        else:
            low = middle
    return high


def _texts(windows: Sequence[Scored]) -> list[Scored]:
    """The windows as one text, in some orders."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(windows), generator=generator).tolist() for _ in range(ORDERS)]
    return [
        Scored(torch.cat([windows[i].scores for i in order]), torch.cat([windows[i].counted for i in order]))
        for order in orders
    ]


def _tokens(windows: Sequence[Scored]) -> int:
    return sum(int(window.counted.sum()) for window in windows)
