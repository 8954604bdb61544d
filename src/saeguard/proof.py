"""Two texts by which a server proves a guardrail before it serves: one that must fire and one that must not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saeguard.gate import Gate
from saeguard.sample import FORGET, ReadWindow, scored, statistics, trajectories
from saeguard.windows import bos_ids


@dataclass(frozen=True)
class Read:
    """A text, its statistic, and whether it is of the topic."""

    statistic: float
    text: str
    forget: bool


def proof_texts(gate: Gate, threshold: float, windows: Sequence[ReadWindow], tokenizer: Any) -> dict[str, str] | None:
    """The two texts among windows; of those whose text gives their ids again, as a server begins with the text."""
    front = bos_ids(tokenizer)
    plain = [w for w in windows if w.ids.tolist() == front + tokenizer(w.text, add_special_tokens=False)["input_ids"]]
    values = statistics(gate, trajectories(gate, scored(gate, plain)))
    return two_of([Read(value, w.text, w.corpus == FORGET) for value, w in zip(values, plain, strict=True)], threshold)


def two_of(read: Sequence[Read], threshold: float) -> dict[str, str] | None:
    """`fires`, the forget text (without any: the text) that reads highest, and `silent`, the retain text in the middle.

    None where the one does not fire or the other does.
    """
    order = sorted(read, key=lambda one: one.statistic)
    topic = [one for one in order if one.forget] or order
    others = [one for one in order if not one.forget]
    if not others or topic[-1].statistic <= threshold or others[len(others) // 2].statistic > threshold:
        return None
    return {"fires": topic[-1].text, "silent": others[len(others) // 2].text}
