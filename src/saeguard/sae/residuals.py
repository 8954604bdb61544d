"""Residual streams of text on disk, to train SAEs on: read once, used for any number of widths and sparsities.

Only `fit` documents are read, so that what a guardrail is calibrated and tested on was never trained on. Each
corpus gives an equal share of tokens; its documents are taken in the order of a hash, so a share is a fair sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.activations import residual_batches
from saeguard.corpus import Corpus, Split, text_key
from saeguard.errors import CorpusError
from saeguard.model import text_config
from saeguard.progress import progress
from saeguard.windows import Window, Windower

LENGTHS = (48, 256)
WINDOWS_A_DOCUMENT = 12
CHUNK = 512


def training_windows(tokenizer: Any, corpora: Sequence[Corpus], tokens: int, *, split: Split = "fit") -> list[Window]:
    """About `tokens` tokens of windows, an equal share of each corpus; every other document in the chat template."""
    windower = Windower(tokenizer, LENGTHS, chat=tokenizer.chat_template is not None)
    return [window for corpus in corpora for window in _share(windower, corpus, tokens // len(corpora), split)]


def _share(windower: Windower, corpus: Corpus, tokens: int, split: Split) -> Iterator[Window]:
    documents = sorted(corpus.documents(), key=lambda document: text_key(document.text))
    taken = 0
    for document in documents:
        if document.split != split:
            continue
        for window in list(windower.cut(document))[:WINDOWS_A_DOCUMENT]:
            if taken >= tokens:
                return
            taken += len(window.ids)
            yield window


def collect_residuals(
    model: nn.Module, tokenizer: Any, layer: int, windows: Sequence[Window], path: Path, *, show: bool = True
) -> Tensor:
    """Residual stream (tokens, d_model) in bfloat16 at the valid tokens, as a memory-mapped file that is kept.

    A finished file is used again; a killed run goes on after its last finished chunk of windows.
    """
    width: int = text_config(model).hidden_size
    state = path.with_suffix(".json")
    done: dict[str, int] = json.loads(state.read_text("utf-8")) if state.is_file() else {"windows": 0, "rows": 0}
    room = sum(len(window.ids) for window in windows)
    if room == 0:
        raise CorpusError("no text to train on: every corpus is empty or too short")
    rows = torch.from_file(str(path), shared=True, size=room * width, dtype=torch.bfloat16).view(room, width)
    past = sum(len(window.ids) for window in windows[: done["windows"]])
    with progress("reading", room, unit="tokens", show=show, done=past) as advance:
        for start in range(done["windows"], len(windows), CHUNK):
            chunk = windows[start : start + CHUNK]
            for batch in residual_batches(model, tokenizer, layer, chunk):
                found = batch.hidden[batch.masks.valid].to(torch.bfloat16).cpu()
                rows[done["rows"] : done["rows"] + len(found)] = found
                done["rows"] += len(found)
            done["windows"] = start + len(chunk)
            _save(state, done)
            advance(sum(len(window.ids) for window in chunk))
    return rows[: done["rows"]]


def windows_digest(windows: Sequence[Window]) -> str:
    """Names exactly these tokens in this order, so that residual streams of other text are never used again."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(json.dumps(list(window.ids)).encode())
    return digest.hexdigest()[:16]


def _save(path: Path, done: dict[str, int]) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(done), "utf-8")
    temporary.replace(path)
