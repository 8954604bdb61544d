"""The offline pass: corpora through model and SAE into small files, resumable shard by shard.

A shard covers some documents of one corpus. It keeps the feature statistics of their `fit` windows, and the
values at the hook point of a bounded sample of windows of all splits, from which every gate is fitted, calibrated and
tested afterwards without another pass. The sample is drawn by a hash of each window, so it does not depend on
the order of work; neither memory nor disk grows with the corpus.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saeguard.activations import residual_batches
from saeguard.corpus import Corpus, CorpusSummary, Document, Split
from saeguard.errors import CorpusError
from saeguard.model import layer_device
from saeguard.progress import Advance
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.statistics import FeatureStatistics
from saeguard.tokens import TokenMasks
from saeguard.windows import Window, Windower

SHARD_CHARACTERS = 60_000
CHARACTERS_PER_TOKEN = 4
HASH_RANGE = 1 << 64
NAME_LENGTH = 40
WINDOW_TENSORS = ("ids", "hidden", "norms", "valid", "first")
ENCODE_TOKENS = 512  # of whose activations several passes are made, faster while they fit in the cache


@dataclass(frozen=True)
class SampledWindow:
    """A window with the values at the hook point (tokens, d), its token masks (1, tokens), and the norms (tokens) of
    the residual stream after the layer."""

    corpus: str
    document: int
    split: Split
    length: int
    text: str
    ids: Tensor
    hidden: Tensor
    norms: Tensor
    masks: TokenMasks


@dataclass(frozen=True)
class Pass:
    """What the offline pass needs; the SAE says at which hook point of the layer. `sample` bounds the tokens kept of
    each corpus."""

    model: nn.Module
    tokenizer: Any
    sae: SparseAutoencoder
    layer: int
    windower: Windower
    sample: int

    def placed(self) -> Pass:
        """The same with the SAE on the device of the layer's values."""
        return replace(self, sae=self.sae.to(layer_device(self.model, self.layer)))


@dataclass(frozen=True)
class Shard:
    """A finished shard file."""

    path: Path

    def statistics(self) -> FeatureStatistics:
        """The feature statistics of its `fit` windows."""
        with self._open() as file:
            return FeatureStatistics.from_tensors(
                {name: file.get_tensor(name) for name in ("count", "total", "squares", "fired")}
            )

    def windows(self) -> Iterator[SampledWindow]:
        """Its sampled windows, one after another."""
        with self._open() as file:
            entries = json.loads(file.metadata()["windows"])
            corpus = file.metadata()["corpus"]
            flat = {name: file.get_tensor(name) for name in WINDOW_TENSORS} if entries else {}
        start = 0
        for entry in entries:
            end = start + entry.pop("tokens")
            ids, hidden, norms, valid, first = (flat[name][start:end] for name in WINDOW_TENSORS)
            masks = TokenMasks(torch.ones_like(valid)[None], first[None], valid[None])
            yield SampledWindow(corpus=corpus, ids=ids, hidden=hidden, norms=norms, masks=masks, **entry)
            start = end

    def _open(self) -> Any:
        return safe_open(self.path, framework="pt")


def run_pass(
    task: Pass, corpora: Mapping[str, Corpus], summaries: Mapping[str, CorpusSummary], folder: Path, advance: Advance
) -> dict[str, list[Shard]]:
    """Make every shard that is not there yet; all shards by corpus name. `advance` is told the tokens done."""
    task = task.placed()
    stems = {name: f"{place:03d}-{_safe(name)}" for place, name in enumerate(sorted(corpora))}
    return {
        name: [
            _shard(task, name, documents, summaries[name], folder / f"{stems[name]}-{number:05d}.safetensors", advance)
            for number, documents in enumerate(document_chunks(corpus))
        ]
        for name, corpus in corpora.items()
    }


def estimated_tokens(summaries: Iterable[CorpusSummary]) -> int:
    """How many tokens a pass over these corpora will read, from their characters."""
    return sum(summary.characters for summary in summaries) // CHARACTERS_PER_TOKEN


def document_chunks(corpus: Corpus) -> Iterator[list[Document]]:
    """The documents of each shard."""
    chunk: list[Document] = []
    size = 0
    for document in corpus.documents():
        chunk.append(document)
        size += len(document.text)
        if size >= SHARD_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _shard(
    task: Pass, corpus: str, documents: list[Document], summary: CorpusSummary, path: Path, advance: Advance
) -> Shard:
    """The shard of these documents, computed unless its file is there and whole."""
    if not _is_whole(path, corpus):
        share = min(1.0, task.sample * CHARACTERS_PER_TOKEN / summary.characters)
        _write(path, *_compute(task, corpus, documents, share), corpus=corpus)
    advance(sum(len(document.text) for document in documents) // CHARACTERS_PER_TOKEN)
    return Shard(path)


def _compute(
    task: Pass, corpus: str, documents: list[Document], share: float
) -> tuple[FeatureStatistics, list[tuple[Window, dict[str, Tensor]]]]:
    """Statistics over the `fit` windows, and the sampled windows with their tensors."""
    statistics = FeatureStatistics.empty(task.sae.d_sae)
    kept: list[tuple[Window, dict[str, Tensor]]] = []
    windows = [window for document in documents for window in task.windower.cut(document)]
    sampled = {id(window) for window in windows if _draw(corpus, window) < share}
    wanted = [window for window in windows if window.split == "fit" or id(window) in sampled]
    for batch in residual_batches(task.model, task.tokenizer, task.layer, wanted, hook=task.sae.hook):
        fit = torch.tensor([window.split == "fit" for window in batch.windows], device=batch.hidden.device)
        for block in torch.split(batch.hidden[batch.masks.valid & fit[:, None]], ENCODE_TOKENS):
            statistics = statistics.merge(FeatureStatistics.of(task.sae.encode(block)))
        for row, window in enumerate(batch.windows):
            if id(window) in sampled:
                parts = {"ids": batch.input_ids, "hidden": batch.hidden, "norms": batch.norms, **vars(batch.masks)}
                end = len(window.ids)
                kept.append((window, {name: part[row, :end].cpu().clone() for name, part in parts.items()}))
    return statistics, kept


def _write(
    path: Path, statistics: FeatureStatistics, kept: list[tuple[Window, dict[str, Tensor]]], *, corpus: str
) -> None:
    """Write the file under another name, then rename it: a shard is there whole or not at all."""
    tensors = statistics.tensors()
    for name in WINDOW_TENSORS:
        if kept:
            tensors[name] = torch.cat([parts[name] for _, parts in kept])
    entries = [
        {"document": w.document, "split": w.split, "length": w.length, "text": w.text, "tokens": len(w.ids)}
        for w, _ in kept
    ]
    temporary = path.with_suffix(".partial")
    try:
        save_file(tensors, temporary, metadata={"corpus": corpus, "windows": json.dumps(entries)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CorpusError(
            f"cannot write {path}: {error}. The shards already finished are kept: free some space and run again."
        ) from error


def _is_whole(path: Path, corpus: str) -> bool:
    """Whether a finished shard of this corpus is there (a damaged one is computed again)."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            entries = json.loads(metadata.get("windows", "null"))
            return isinstance(entries, list) and metadata.get("corpus") == corpus
    except (OSError, SafetensorError, ValueError, struct.error):
        return False


def _draw(corpus: str, window: Window) -> float:
    """A number in [0, 1) that depends on the window alone."""
    key = json.dumps([corpus, window.document, window.ids]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / HASH_RANGE


def _safe(name: str) -> str:
    """A name as part of a file name, to be read by people; it need not be unique."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:NAME_LENGTH]


def pass_fingerprint(task: Pass, model: Mapping[str, Any], summaries: Mapping[str, CorpusSummary]) -> str:
    """Identity of a pass: the same model, SAE, layer, windows and texts give the same shards."""
    parts = [
        model, task.sae.fingerprint(), task.layer, task.sae.hook, task.windower.lengths, task.windower.chat,
        task.sample,
        {name: asdict(summary) | {"keys": None} for name, summary in summaries.items()},
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
