"""The losses of the weight-changing methods written out with loops over rows and tokens, in double precision.

Each takes logits or residual streams as plain tensors and shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Row = tuple[Tensor, Sequence[int]]
"""Logits (tokens, vocabulary) and the ids of one row, without padding."""


def log_softmax(scores: Sequence[float], temperature: float = 1.0) -> list[float]:
    """log of exp(s / T) / sum exp(s / T)."""
    scaled = [score / temperature for score in scores]
    top = max(scaled)
    total = top + math.log(sum(math.exp(score - top) for score in scaled))
    return [score - total for score in scaled]


def token_log_probabilities(row: Row) -> list[float]:
    """log p(y_t | y_<t) for t = 2..T."""
    logits, ids = row
    return [log_softmax(logits[t - 1].tolist())[ids[t]] for t in range(1, len(ids))]


def nll(rows: Sequence[Row]) -> float:
    each = [value for row in rows for value in token_log_probabilities(row)]
    return -sum(each) / len(each)


def kl(before: Sequence[Row], now: Sequence[Row], temperature: float = 1.0) -> float:
    """T^2 KL, the mean over predicted tokens."""
    found = []
    for (old, ids), (new, _) in zip(before, now, strict=True):
        for t in range(len(ids) - 1):
            p, q = log_softmax(old[t].tolist(), temperature), log_softmax(new[t].tolist(), temperature)
            found.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    return temperature**2 * sum(found) / len(found)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def npo(before: Sequence[Row], now: Sequence[Row], beta: float) -> float:
    each = []
    for old, new in zip(before, now, strict=True):
        ratio = sum(token_log_probabilities(new)) - sum(token_log_probabilities(old))
        each.append(-2 / beta * log_sigmoid(-beta * ratio))
    return sum(each) / len(each)


def simnpo(now: Sequence[Row], beta: float, margin: float) -> float:
    each = []
    for row in now:
        values = token_log_probabilities(row)
        each.append(-2 / beta * log_sigmoid(-beta * sum(values) / len(values) - margin))
    return sum(each) / len(each)


def squared_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean of squares over all but the first token of each row (tokens, d_model), and over dimensions."""
    total, count = 0.0, 0
    for a, b in zip(found, wanted, strict=True):
        for t in range(1, len(a)):
            for x, y in zip(a[t].tolist(), b[t].tolist(), strict=True):
                total, count = total + (x - y) ** 2, count + 1
    return total / count


def suppressed(now: Sequence[Tensor], before: Sequence[Tensor], features: Sequence[int]) -> float:
    """Sum of activations (tokens, d_sae) of some features over the number of those that were active before."""
    total, count = 0.0, 0
    for a, b in zip(now, before, strict=True):
        for t in range(1, len(a)):
            for j in features:
                total, count = total + float(a[t, j]), count + (float(b[t, j]) > 0)
    return total / count
