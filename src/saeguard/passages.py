"""What lights a feature up: its strongest tokens and passages, for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saeguard.sample import ReadWindow

PASSAGES = 5
CONTEXT = 12


def top_passages(windows: Sequence[ReadWindow], ids: Sequence[int], tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """For each feature, the windows with its highest activation: value, corpus, and the token in its context."""
    peaks = torch.stack([(w.activations * w.masks.valid[0][:, None]).amax(dim=0) for w in windows])
    found: dict[str, list[dict[str, Any]]] = {}
    for column, feature in enumerate(ids):
        best = peaks[:, column].topk(min(PASSAGES, len(windows)))
        found[str(feature)] = [
            _of_window(windows[place], column, value, tokenizer)
            for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            if value > 0
        ]
    return found


def passage(ids: Tensor, at: int, tokenizer: Any, *, corpus: str, activation: float) -> dict[str, Any]:
    """The token `at` some place in `ids` (tokens,), with what stands before and after it."""
    return {
        "corpus": corpus,
        "activation": activation,
        "before": tokenizer.decode(ids[max(0, at - CONTEXT) : at]),
        "token": tokenizer.decode(ids[at : at + 1]),
        "after": tokenizer.decode(ids[at + 1 : at + 1 + CONTEXT]),
    }


def _of_window(window: ReadWindow, column: int, value: float, tokenizer: Any) -> dict[str, Any]:
    at = int((window.activations[:, column] * window.masks.valid[0]).argmax())
    return passage(window.ids, at, tokenizer, corpus=window.corpus, activation=value)
