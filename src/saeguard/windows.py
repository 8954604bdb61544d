"""Windows: documents cut into token sequences as they will be served, and batched.

A document that fits into the longest length of the mix is one window, as it is: a question stays a question.
A longer one is cut at one length of the mix, chosen by its text, since a threshold found on long prose does
not fit short questions. A window never crosses documents. With a chat template, every other
document's windows are wrapped as a user's message, special tokens and all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saeguard.corpus import Document, Split, text_key

LENGTHS = (32, 64, 256)
MIN_TOKENS = 8


@dataclass(frozen=True)
class Window:
    """A token sequence: `ids` as they go into the model, `length` its place in the length mix."""

    document: int
    split: Split
    length: int
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Windower:
    """Cuts documents into windows. `chat` wraps every other document in the chat template."""

    tokenizer: Any
    lengths: tuple[int, ...] = LENGTHS
    chat: bool = False

    def cut(self, document: Document) -> Iterator[Window]:
        """The windows of one document, none shorter than `MIN_TOKENS` unless the document is."""
        key = text_key(document.text)
        length = self.lengths[key % len(self.lengths)]
        as_chat = self.chat and (key // len(self.lengths)) % 2 == 0
        ids = self.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(ids) <= max(self.lengths):
            length = max(self.lengths)
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            if start and len(piece) < min(MIN_TOKENS, length):
                continue
            text = self.tokenizer.decode(piece)
            yield Window(document.index, document.split, length, tuple(self._render(piece, text, as_chat)), text)

    def _render(self, piece: list[int], text: str, as_chat: bool) -> list[int]:
        if as_chat:
            return chat_ids(self.tokenizer, [{"role": "user", "content": text.strip()}])
        return bos_ids(self.tokenizer) + piece


def bos_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts in front of a text (BOS or nothing)."""
    ids = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(ids) - len(bare) + 1):
        if ids[start : start + len(bare)] == bare:
            return list(ids[:start])
    return []


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text alone, without any that the tokenizer adds."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation, ready for the assistant's answer."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text_ids(tokenizer, text)


def batches(windows: Iterable[Window], *, tokens: int) -> Iterator[list[Window]]:
    """Group windows of like length so that a padded batch holds at most `tokens` tokens (or one window)."""
    batch: list[Window] = []
    for window in sorted(windows, key=lambda window: -len(window.ids)):
        width = len(batch[0].ids) if batch else len(window.ids)
        if batch and width * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def pad(windows: Sequence[Window], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """`input_ids` and the attention mask (batch, tokens), padded on the right."""
    width = max(len(window.ids) for window in windows)
    ids = torch.full((len(windows), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        mask[row, : len(window.ids)] = 1
    return ids, mask


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask (rows, tokens) of rows that are not empty, padded on the right with the last id of each."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask
