"""Long text for `gates.py`: streams of ordinary text, and questions read after more and more of it.

A stream is read once, with a cache; at each filler length every question that belongs to it is read on from a copy.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from saeguard.corpus import SPLIT_PATTERN
from saeguard.hookpoints import HookPoint
from saeguard.hooks import at
from saeguard.model import port_at
from saeguard.tokens import TokenMasks, special_token_ids, token_masks

FILLERS = (0, 100, 400, 1600, 4000)
CHUNK = 500
ROWS = 8
Ids = list[int]


@dataclass(frozen=True)
class Piece:
    """Tokens read in their place: residual streams (tokens, d_model), and which of them are valid (tokens,).

    `topic` is that of the question, after `filler` tokens of the stream; the stream itself has none.
    """

    topic: str
    filler: int
    hidden: Tensor
    valid: Tensor


def test_stream(tokenizer: Any, texts: Sequence[str]) -> Ids:
    """Ids of the test split's passages, one after another, as long as the longest filler."""
    test = [text for place, text in enumerate(texts) if SPLIT_PATTERN[place % len(SPLIT_PATTERN)] == "test"]
    return list(tokenizer("\n\n".join(test), add_special_tokens=False)["input_ids"][: FILLERS[-1]])


def read_stream(
    model: Any, tokenizer: Any, layer: int, stream: Ids, questions: Sequence[tuple[str, Ids]], path: Path
) -> list[Piece]:
    """The stream, then every question after each filler length; kept in `path`, and read from there if it is whole."""
    if not path.exists():
        reader = _Reader(model, layer, torch.tensor(special_token_ids(tokenizer)))
        _write(list(reader.pieces(stream, questions)), path)
    with safe_open(path, framework="pt") as file:
        entries = json.loads(file.metadata()["pieces"])
        hidden, valid = file.get_tensor("hidden"), file.get_tensor("valid")
    sizes = [entry.pop("tokens") for entry in entries]
    parts = zip(entries, hidden.split(sizes), valid.split(sizes), strict=True)
    return [Piece(**entry, hidden=its, valid=ok) for entry, its, ok in parts]


def masks_of(valid: Tensor) -> TokenMasks:
    """Masks (1, tokens) of a sequence without padding."""
    first = torch.zeros_like(valid)
    first[0] = True
    return TokenMasks(torch.ones_like(valid)[None], first[None], valid[None])


@dataclass(frozen=True)
class _Reader:
    model: Any
    layer: int
    special: Tensor

    def pieces(self, stream: Ids, questions: Sequence[tuple[str, Ids]]) -> Iterator[Piece]:
        cache, parts = DynamicCache(), []
        for start, end in pairwise((0, *FILLERS)):
            for at_once in range(start, end, CHUNK):
                parts.append(self._read([stream[at_once : min(end, at_once + CHUNK)]], cache)[0])
            for first in range(0, len(questions), ROWS):
                some = questions[first : first + ROWS]
                copied = copy.deepcopy(cache)
                if end:
                    copied.batch_repeat_interleave(len(some))
                for (topic, ids), hidden in zip(some, self._read([ids for _, ids in some], copied), strict=True):
                    yield Piece(topic, end, hidden, self._valid(ids, begins=end == 0))
        yield Piece("", 0, torch.cat(parts), self._valid(stream, begins=True))

    def _read(self, rows: Sequence[Ids], cache: DynamicCache) -> list[Tensor]:
        """Residual streams (tokens, d_model) of each row; the cache goes on."""
        width, past = max(map(len, rows)), int(cache.get_seq_length())
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * (past + len(row)) + [0] * (width - len(row)) for row in rows])
        found: list[Tensor] = []
        with torch.inference_mode(), at(port_at(self.model, HookPoint(self.layer)), found.append):
            self.model.base_model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return [found[0][row, : len(its)].clone() for row, its in enumerate(rows)]

    def _valid(self, ids: Ids, *, begins: bool) -> Tensor:
        tokens = torch.tensor([ids])
        started = torch.tensor([not begins])
        return token_masks(tokens, torch.ones_like(tokens).bool(), self.special, started=started).valid[0]


def _write(pieces: Sequence[Piece], path: Path) -> None:
    entries = [{"topic": p.topic, "filler": p.filler, "tokens": len(p.valid)} for p in pieces]
    tensors = {"hidden": torch.cat([p.hidden for p in pieces]), "valid": torch.cat([p.valid for p in pieces])}
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"pieces": json.dumps(entries)})
    temporary.replace(path)
