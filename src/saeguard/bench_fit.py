"""How fast the offline pass of `fit` is against the bare truncated forward pass, and how much memory it takes."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saeguard.activations import residual_batches
from saeguard.corpus import Corpus
from saeguard.embedded import starter_set
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.shards import Pass, run_pass
from saeguard.windows import Windower

DOCUMENT_WORDS = 150
CHARACTERS_A_TOKEN = 4.5


def fit_throughput(model: Any, tokenizer: Any, sae: SparseAutoencoder, layer: int, *, tokens: int) -> dict[str, float]:
    """Tokens a second of the pass over about `tokens` tokens, and of the bare forward pass; peak memory in MB.

    The text is the starter set's words over and over, reshuffled so that no document repeats.
    """
    texts = synthetic_documents(2 * tokens)  # half of the documents are for fitting
    windower = Windower(tokenizer)
    windows = [
        window for document in Corpus.of("text", "retain", texts).documents() for window in windower.cut(document)
    ]
    fit_windows = [window for window in windows if window.split == "fit"]
    count = sum(len(window.ids) for window in fit_windows)
    bare = _seconds(lambda: [None for _ in residual_batches(model, tokenizer, layer, fit_windows)])
    corpus = Corpus.of("text", "retain", texts)
    with tempfile.TemporaryDirectory() as folder:
        task = Pass(model, tokenizer, sae, layer, windower, sample=1)
        whole = _seconds(
            lambda: run_pass(task, {"text": corpus}, {"text": corpus.summary()}, Path(folder), lambda tokens: None)
        )
    return {
        "tokens": float(count),
        "bare_tokens_per_second": count / bare,
        "fit_tokens_per_second": count / whole,
        "share_of_bare": bare / whole,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def synthetic_documents(tokens: int) -> list[str]:
    """Documents of shuffled starter-set words, about `tokens` tokens in all."""
    paths = starter_set().retain.values()
    words = " ".join(text for path in paths for text in Corpus.of(path.stem, "retain", path).read()).split()
    generator = torch.Generator().manual_seed(0)
    documents, characters = [], 0
    while characters < tokens * CHARACTERS_A_TOKEN:
        picked = torch.randint(len(words), (DOCUMENT_WORDS,), generator=generator).tolist()
        documents.append(" ".join(words[i] for i in picked))
        characters += len(documents[-1])
    return documents


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
