"""Explanations of our own: what every feature of an SAE is active at, found in text.

One streaming pass keeps the strongest windows of every feature (`peaks`). The description of a feature is then the
words at its peaks that say most about it. With p(w) the share of the peaks' activation at the word w, and q(w) the
share of all tokens that are the token it peaks at:

    score(w) = p(w) log(p(w) / q(w))

the contribution of w to the Kullback-Leibler divergence of the peaks from the text. This names words; it does not
judge whether they have a meaning in common. Only documents of the split `fit` are read, so that a fit on the
same text is still calibrated and tested on documents that chose nothing.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import log
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saeguard.activations import residual_batches
from saeguard.corpus import Corpus, Document
from saeguard.errors import CorpusError, ExplanationError
from saeguard.explain.peaks import NO_TOKEN, Peaks
from saeguard.model import model_fingerprint, text_config
from saeguard.passages import CONTEXT, PASSAGES, passage
from saeguard.progress import Advance
from saeguard.shards import CHARACTERS_PER_TOKEN, Pass, document_chunks

WORDS = 10
BY_WORDS = "words"
PEAKS_FILE = "peaks.safetensors"


def read_peaks(
    task: Pass, corpora: Mapping[str, Corpus], folder: Path, *, k: int, advance: Advance = lambda tokens: None
) -> Peaks:
    """The k strongest windows of every feature. What was read so far is in `folder`, and is not read again."""
    path, task = folder / PEAKS_FILE, task.placed()
    peaks, done = _resume(path) or (Peaks.empty(task.sae.d_sae, k, text_config(task.model).vocab_size), 0)
    chunks = ((place, chunk) for place, name in enumerate(sorted(corpora)) for chunk in document_chunks(corpora[name]))
    for number, (place, documents) in enumerate(chunks, 1):
        if number > done:
            peaks = _read(task, peaks, place, documents)
            _save(path, peaks, number)
        advance(sum(len(document.text) for document in documents) // CHARACTERS_PER_TOKEN)
    return peaks


def explanation_rows(
    task: Pass, peaks: Peaks, corpora: Sequence[str], *, contexts: int = PASSAGES
) -> Iterator[dict[str, Any]]:
    """A row of the explanations file for every feature that was active at all; `corpora` are the names read."""
    names, count = sorted(corpora), int(peaks.tokens.sum())
    belongs = {
        "sae": task.sae.fingerprint(), "layer": task.layer, "model": model_fingerprint(task.model)["name"],
    }  # fmt: skip
    for feature in peaks.fired.nonzero().flatten().tolist():
        kept = zip(peaks.activations[feature].tolist(), peaks.contexts[feature], peaks.corpus[feature], strict=True)
        found = [
            (_context(ids, task.tokenizer, corpus=names[corpus], activation=round(value, 3)), int(ids[CONTEXT]))
            for value, ids, corpus in kept
            if value > 0
        ]
        words = _characteristic([(p, int(peaks.tokens[token]) / count) for p, token in found])
        yield {
            "feature": feature, "description": ", ".join(words), "by": BY_WORDS,
            "firing_rate": float(f"{int(peaks.fired[feature]) / count:.3g}"),
            "contexts": [p for p, _ in found[:contexts]], **belongs,
        }  # fmt: skip


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write an explanations file, `.jsonl` or `.jsonl.gz`, whole or not at all. Raises `ExplanationError`."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    temporary = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ExplanationError(f"cannot write {path}: {error}") from error


def _read(task: Pass, peaks: Peaks, corpus: int, documents: Sequence[Document]) -> Peaks:
    windows = [window for document in documents if document.split == "fit" for window in task.windower.cut(document)]
    for batch in residual_batches(task.model, task.tokenizer, task.layer, windows):
        ids = batch.input_ids.masked_fill(~batch.masks.attended, NO_TOKEN).cpu()
        highest = torch.zeros(len(ids), task.sae.d_sae)
        at = torch.zeros(len(ids), task.sae.d_sae, dtype=torch.int64)
        for row, valid in enumerate(batch.masks.valid):
            if bool(valid.any()):
                a = task.sae.encode(batch.hidden[row, valid])
                peaks = peaks.count(a, batch.input_ids[row, valid])
                best = a.max(dim=0)
                highest[row], at[row] = best.values.cpu(), valid.nonzero().flatten()[best.indices].cpu()
        peaks = peaks.merge(highest, at, ids, corpus)
    return peaks


def _context(ids: Tensor, tokenizer: Any, *, corpus: str, activation: float) -> dict[str, Any]:
    """A passage from a context of `Peaks`, its peak in the middle."""
    outside = int((ids[:CONTEXT] == NO_TOKEN).sum())
    return passage(ids[ids != NO_TOKEN], CONTEXT - outside, tokenizer, corpus=corpus, activation=activation)


def _characteristic(peaks: Sequence[tuple[Mapping[str, Any], float]]) -> list[str]:
    """The words of highest score, from passages and the share of all tokens that each one's token is."""
    total = sum(p["activation"] for p, _ in peaks) or 1.0
    share: dict[str, float] = {}
    ordinary: dict[str, float] = {}
    for p, q in peaks:
        word = whole_word(p["before"], p["token"], p["after"])
        share[word] = share.get(word, 0.0) + p["activation"] / total
        ordinary[word] = max(q, ordinary.get(word, 0.0))
    scores = {word: p * log(p / ordinary[word]) for word, p in share.items() if p > ordinary[word]}
    return sorted(scores, key=lambda word: -scores[word])[:WORDS]


def whole_word(before: str, token: str, after: str) -> str:
    """The word a token is of, in lower case; a token without letters and digits as it is."""
    if not any(character.isalnum() for character in token):
        return token.strip() or "␣"
    start = "" if token[:1].isspace() else re.findall(r"[\w'’-]*$", before)[0]
    end = "" if token[-1:].isspace() else re.findall(r"^[\w'’-]*", after)[0]
    return f"{start}{token}{end}".strip().lower()


def _save(path: Path, peaks: Peaks, done: int) -> None:
    temporary = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(vars(peaks)), temporary, metadata={"done": json.dumps(done)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise CorpusError(
            f"cannot write {path}: {error}. What was read before is kept: free some space and run again."
        ) from error


def _resume(path: Path) -> tuple[Peaks, int] | None:
    """What an earlier run left, and how many pieces of text it had read; None where there is nothing whole."""
    try:
        with safe_open(path, framework="pt") as file:
            return Peaks(**{name: file.get_tensor(name) for name in file.keys()}), int(file.metadata()["done"])  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, struct.error):
        return None
