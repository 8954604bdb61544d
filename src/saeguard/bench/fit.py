"""How fast the offline pass of `fit` is against the bare truncated forward pass, and how much memory it takes."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from saeguard.activations import residual_batches
from saeguard.corpus import Corpus
from saeguard.embedded import starter_set
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.shards import Pass, document_chunks, run_pass
from saeguard.windows import Windower

DOCUMENT_WORDS = 150
CHARACTERS_A_TOKEN = 4.5
T = TypeVar("T")


def fit_throughput(model: Any, tokenizer: Any, sae: SparseAutoencoder, layer: int, *, tokens: int) -> dict[str, float]:
    """Tokens a second of the pass over about `tokens` tokens, and of the bare forward pass; peak memory in MB.

    Both read a file of the starter set's words over and over, reshuffled so that no document repeats.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for text in synthetic_documents(2 * tokens):  # half of the documents are for fitting
                print(json.dumps({"text": text}), file=file)
        corpus = Corpus.of("text", "retain", path)
        task = Pass(model, tokenizer, sae, layer, Windower(tokenizer), sample=1)
        bare, count = _seconds(lambda: _bare_pass(task, corpus))
        whole, _ = _seconds(
            lambda: run_pass(task, {"text": corpus}, {"text": corpus.summary()}, Path(folder), lambda tokens: None)
        )
    return {
        "tokens": float(count),
        "bare_tokens_per_second": count / bare,
        "fit_tokens_per_second": count / whole,
        "share_of_bare": bare / whole,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _bare_pass(task: Pass, corpus: Corpus) -> int:
    """The forward passes that `run_pass` makes, and nothing with what they give; the tokens read."""
    count = 0
    for documents in document_chunks(corpus):
        windows = [window for document in documents for window in task.windower.cut(document)]
        wanted = [window for window in windows if window.split == "fit"]
        count += sum(len(window.ids) for window in wanted)
        for _ in residual_batches(task.model, task.tokenizer, task.layer, wanted):
            pass
    return count


def synthetic_documents(tokens: int) -> Iterator[str]:
    """Documents of shuffled starter-set words, about `tokens` tokens in all."""
    paths = starter_set().retain.values()
    words = " ".join(text for path in paths for text in Corpus.of(path.stem, "retain", path).read()).split()
    generator = torch.Generator().manual_seed(0)
    characters = 0.0
    while characters < tokens * CHARACTERS_A_TOKEN:
        picked = torch.randint(len(words), (DOCUMENT_WORDS,), generator=generator).tolist()
        document = " ".join(words[i] for i in picked)
        characters += len(document)
        yield document


def _seconds(run: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result
