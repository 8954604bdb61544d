"""Texts as a method sees them: windows of forget text, and beside each one of retain text.

The documents of the fit split are trained on, those of the calibration split watched by the stopping rule; the test
split is left for judging, as with a guardrail. Every retain corpus gives the same number of windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from saeguard.baselines.likelihood import Batch
from saeguard.corpus import Corpus, Split, check_disjoint
from saeguard.errors import CorpusError
from saeguard.windows import Window, Windower, pad

Item = tuple[Window, Window | None]
HELD_OUT = 32


@dataclass(frozen=True)
class Texts:
    """Windows to forget, windows to keep by corpus, windows held out of those, and the corpora's fingerprints."""

    forget: Sequence[Window]
    retain: Mapping[str, Sequence[Window]]
    held_out: Sequence[Window]
    fingerprints: Mapping[str, str]

    @classmethod
    def read(cls, tokenizer: Any, forget: Corpus, retain: Mapping[str, Corpus], max_tokens: int) -> Texts:
        """Cut the corpora into windows. Raises `CorpusError` for one with too little text or shared documents."""
        windower = Windower(tokenizer, (max_tokens,))
        summaries = {name: corpus.summary() for name, corpus in retain.items()}
        forgotten = forget.summary()
        check_disjoint(forgotten, summaries)
        held_out = [_windows(windower, corpus, "calibration") for corpus in retain.values()]
        return cls(
            _windows(windower, forget, "fit"),
            {name: _windows(windower, corpus, "fit") for name, corpus in retain.items()},
            [window for windows in held_out for window in windows[: -(-HELD_OUT // len(held_out))]],
            {"forget": forgotten.fingerprint} | {f"retain.{n}": one.fingerprint for n, one in summaries.items()},
        )

    def mixed(self, count: int) -> list[Window]:
        """At most `count` windows to keep, of every corpus alike."""
        share = -(-count // max(1, len(self.retain)))
        return [window for windows in self.retain.values() for window in windows[:share]]


class Pairs(Dataset[Item]):
    """`count` pairs of a forget window and a retain window, all windows of a corpus equally often and shuffled."""

    def __init__(self, texts: Texts, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        forget = _repeated(texts.forget, count, generator)
        corpora = [_repeated(windows, count, generator) for windows in texts.retain.values()]
        retain = [corpora[i % len(corpora)][i // len(corpora)] if corpora else None for i in range(count)]
        self._items: list[Item] = list(zip(forget, retain, strict=True))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index]


def collate(items: Sequence[Item], pad_id: int) -> dict[str, Batch]:
    """A `Pair` of padded batches."""
    pair = {"forget": batch_of([forget for forget, _ in items], pad_id)}
    kept = [retain for _, retain in items if retain is not None]
    return pair | ({"retain": batch_of(kept, pad_id)} if kept else {})


def batch_of(windows: Sequence[Window], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """A padded batch."""
    ids, mask = pad(windows, pad_id=pad_id)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def batches_of(windows: Sequence[Window], size: int, pad_id: int, device: torch.device | str) -> list[Batch]:
    """Padded batches of at most `size` windows, in their order."""
    return [batch_of(windows[i : i + size], pad_id, device) for i in range(0, len(windows), size)]


def pad_id_of(tokenizer: Any) -> int:
    """The padding token, or any other where there is none: it is masked."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _windows(windower: Windower, corpus: Corpus, split: Split) -> list[Window]:
    documents = (document for document in corpus.documents() if document.split == split)
    found = [window for document in documents for window in windower.cut(document) if len(window.ids) > 1]
    if not found:
        raise CorpusError(f"the {corpus.role} corpus {corpus.name!r} has no text in its {split} split: it needs more")
    return found


def _repeated(windows: Sequence[Window], count: int, generator: torch.Generator) -> list[Window]:
    rounds = -(-count // len(windows))
    order = [int(i) for _ in range(rounds) for i in torch.randperm(len(windows), generator=generator)]
    return [windows[i] for i in order[:count]]
