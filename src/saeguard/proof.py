"""Two texts by which a server proves a guardrail before it serves: one that must fire and one that must not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saeguard.gate import Gate
from saeguard.sample import FORGET, ReadWindow, scored, statistics, trajectories
from saeguard.windows import bos_ids


def proof_texts(gate: Gate, threshold: float, windows: Sequence[ReadWindow], tokenizer: Any) -> dict[str, str] | None:
    """`fires`, the forget text (without any: the text) that reads highest, and `silent`, the retain text in the middle.

    None where the one does not fire or the other does. Only windows whose text gives their ids again are taken: a
    server begins with the text.
    """
    front = bos_ids(tokenizer)
    plain = [w for w in windows if w.ids.tolist() == front + tokenizer(w.text, add_special_tokens=False)["input_ids"]]
    values = statistics(gate, trajectories(gate, scored(gate, plain)))
    read = sorted(zip(values, plain, strict=True), key=lambda pair: pair[0])
    topic = [pair for pair in read if pair[1].corpus == FORGET] or read
    others = [pair for pair in read if pair[1].corpus != FORGET]
    if not others or topic[-1][0] <= threshold or others[len(others) // 2][0] > threshold:
        return None
    return {"fires": topic[-1][1].text, "silent": others[len(others) // 2][1].text}
