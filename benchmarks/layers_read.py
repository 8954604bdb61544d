"""Token values after several layers, read in one forward pass: for `layers.py` and `neighbours.py`.

One file a corpus, and one for the questions of each topic, holds the valid tokens of all windows after each layer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gates import files
from openstax import passages
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from saeguard.config import PRESETS
from saeguard.contamination import contamination
from saeguard.corpus import Corpus
from saeguard.detectors import LabelledWindows, cross_fitted_scores
from saeguard.embedded import LAYER, embedded_model
from saeguard.evaluation.mcq import PROMPT, read_questions
from saeguard.model import residual_streams
from saeguard.sample import FORGET
from saeguard.tokens import special_token_ids, token_masks
from saeguard.windows import Window, Windower, batches, pad, text_ids

QUESTIONS = 150
BATCH_TOKENS = 2048


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("layers.work"))
    parser.add_argument("--passages", type=int, default=800)
    return parser


@dataclass(frozen=True)
class Entry:
    """A window of `tokens` valid tokens. The split of a question is "question", its corpus the topic."""

    corpus: str
    document: int
    split: str
    length: int
    tokens: int
    text: str

    @property
    def key(self) -> tuple[str, int]:
        """The document it is cut from."""
        return self.corpus, self.document


@dataclass(frozen=True)
class Reading:
    """All windows, and for each the rows of the tokens (tokens, d_model) after a layer that are its own."""

    entries: Sequence[Entry]
    parts: Sequence[Path]

    def hidden(self, layer: int) -> Tensor:
        """Values (tokens, d_model) of all windows, one after another."""
        return torch.cat([_tensor(path, f"layer{layer}") for path in self.parts])


def read(data: Path, work: Path, layers: Sequence[int], count: int) -> Reading:
    """What is read of `count` passages of each corpus and the questions of the books; from `work` where it is there."""
    work.mkdir(parents=True, exist_ok=True)
    books, everything = files(data)
    model: tuple[Any, ...] = ()
    jobs: dict[Path, Any] = {work / f"corpus-{name}.safetensors": (name, path) for name, path in everything.items()}
    jobs |= {
        work / f"questions-{name}.safetensors": (name, path.with_name("glossary_mc.jsonl"))
        for name, path in books.items()
    }
    for target, (name, source) in jobs.items():
        if not target.exists():
            model = model or embedded_model()
            cut = _questions if source.name == "glossary_mc.jsonl" else _windows
            write(model, layers, name, cut(model[1], source, count), target)
            print(f"read {target.stem}", flush=True)
    return Reading([entry for path in jobs for entry in entries_of(path)], list(jobs))


def quarantined(reading: Reading, topic: str, work: Path) -> frozenset[tuple[str, int]]:
    """The documents that `fit` would quarantine for this topic; from `work` where they are there."""
    path = work / f"quarantine-{topic}.json"
    if not path.exists():
        path.write_text(json.dumps(sorted(_outliers(reading, topic))), encoding="utf-8")
    return frozenset((name, document) for name, document in json.loads(path.read_text(encoding="utf-8")))


def _outliers(reading: Reading, topic: str) -> set[tuple[str, int]]:
    entries = [replace(entry, corpus=FORGET) if entry.corpus == topic else entry for entry in reading.entries]
    places = [place for place, entry in enumerate(entries) if entry.split in ("fit", "calibration")]
    parts = reading.hidden(LAYER).split([entry.tokens for entry in entries])
    means = torch.stack([part.float().mean(dim=0) for part in parts])
    some = [entries[place] for place in places]
    labelled = LabelledWindows(
        means[places].double().numpy(), np.array([entry.corpus == FORGET for entry in some]),
        [entry.corpus for entry in some], [entry.document for entry in some],
    )  # fmt: skip
    found = contamination(some, cross_fitted_scores(labelled).tolist()).outliers
    return {(topic if name == FORGET else name, document) for name, document in found}


def _windows(tokenizer: Any, path: Path, count: int) -> list[Window]:
    windower = Windower(tokenizer, PRESETS["default"].lengths, chat=True)
    corpus = Corpus.of(path.stem, "retain", passages(path, count))
    return [window for document in corpus.documents() for window in windower.cut(document)]


def _questions(tokenizer: Any, path: Path, _count: int) -> list[Window]:
    ids = [text_ids(tokenizer, "\n\n" + PROMPT.format(question=q.text)) for q in read_questions(path)[:QUESTIONS]]
    return [Window(place, "test", 0, tuple(its), "") for place, its in enumerate(ids)]


def write(model: tuple[Any, ...], layers: Sequence[int], name: str, windows: Sequence[Window], target: Path) -> None:
    found = _values(*model, layers, windows)
    kept = [window for window in windows if len(found[id(window)][layers[0]])]
    entries = [
        Entry(name, w.document, w.split if w.length else "question", w.length, len(found[id(w)][layers[0]]), w.text)
        for w in kept
    ]
    tensors = {f"layer{layer}": torch.cat([found[id(window)][layer] for window in kept]) for layer in layers}
    temporary = target.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"entries": json.dumps([asdict(entry) for entry in entries])})
    temporary.replace(target)


def _values(
    model: Any, tokenizer: Any, layers: Sequence[int], windows: Sequence[Window]
) -> Mapping[int, Mapping[int, Tensor]]:
    """The valid tokens (tokens, d_model) after each layer, by the window's identity."""
    special, found = torch.tensor(special_token_ids(tokenizer)), {}
    for batch in batches(windows, tokens=BATCH_TOKENS):
        ids, mask = pad(batch, pad_id=0)
        streams = residual_streams(model, layers, ids, mask)
        valid = token_masks(ids, mask.bool(), special).valid
        for row, window in enumerate(batch):
            found[id(window)] = {layer: streams[layer][row][valid[row]].clone() for layer in layers}
    return found


def entries_of(path: Path) -> list[Entry]:
    with safe_open(path, framework="pt") as file:
        return [Entry(**entry) for entry in json.loads(file.metadata()["entries"])]


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        found: Tensor = file.get_tensor(name)
        return found
