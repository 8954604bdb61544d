"""Explanations of features, by whoever wrote them: read from a file, and checked against the SAE they should be of.

    Neuronpedia's exports   JSON lines (`.jsonl`, `.jsonl.gz`) with `modelId`, `layer` (as in `3-gemmascope-res-16k`),
                            `index`, `description`, `explanationModelName`; a folder of such batches; the older
                            single `.json`, a list of the same objects or `{"explanations": [...]}`
    ours                    `saeguard explain`: JSON lines with `feature`, `description`, `by`, `sae`, `layer`, `model`
    any other               `.csv`, `.tsv`, `.jsonl[.gz]` with `feature`, `index` or `id`, and with `description`
                            or `explanation`

Ids that belong to another SAE name other features and raise no error anywhere later, so everything that a file says of
its SAE is compared. Neuronpedia's names leave out the sparsity: `3-gemmascope-res-16k` is one of several SAEs of that
width, and which one cannot be seen in the file.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeguard.corpus import read_rows
from saeguard.errors import CorpusError, ExplanationError
from saeguard.sae.autoencoder import SparseAutoencoder

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")
ID_KEYS = ("feature", "index", "id")
TEXT_KEYS = ("description", "explanation")
WIDTH = re.compile(r"(?<![a-z0-9])(\d+)(k|m)(?![a-z0-9])")
MULTIPLES = {"k": 1024, "m": 1024 * 1024}


@dataclass(frozen=True)
class Explanation:
    """What one feature is said to be about, by whom, and what the file says of model, layer (or Neuronpedia's name of
    the SAE) and fingerprint of the SAE; None where it says nothing."""

    feature: int
    text: str
    by: str | None = None
    model: str | None = None
    layer: str | None = None
    sae: str | None = None


@dataclass(frozen=True)
class Explanations:
    """The explanations in a file or folder: its name, the SHA-256 of its bytes, and how many rows were left out
    because they were empty or said again what was said before."""

    source: str
    sha256: str
    rows: tuple[Explanation, ...]
    empty: int
    repeated: int

    def check(self, sae: SparseAutoencoder, layer: int, model: str) -> None:
        """Raise `ExplanationError` where these are not of this SAE on this layer of this model."""
        highest = max(row.feature for row in self.rows)
        if highest >= sae.d_sae:
            raise self._refusal("highest feature id", highest, f"at most {sae.d_sae - 1}, by the SAE's width")
        for row in {(row.model, row.layer, row.sae): row for row in self.rows}.values():
            if row.sae is not None and row.sae != sae.fingerprint():
                raise self._refusal("fingerprint of the SAE", row.sae, f"{sae.fingerprint()}, that of {sae.source}")
            if row.layer is not None:
                self._check_layer(row.layer, sae, layer)
            if row.model is not None and not _same_model(row.model, model):
                raise self._refusal("model", row.model, model)
            known = sae.metadata.get("neuronpedia_id")
            if row.model and row.layer and known and "-" in row.layer and f"{row.model}/{row.layer}" != known:
                raise self._refusal("SAE on Neuronpedia", f"{row.model}/{row.layer}", known)

    def _check_layer(self, name: str, sae: SparseAutoencoder, layer: int) -> None:
        """`name` is a layer, or Neuronpedia's name of an SAE, which says the layer, mostly the place and the width."""
        if (number := re.match(r"\d+", name)) and int(number[0]) != layer:
            raise self._refusal("layer", name, f"layer {layer}")
        if width := WIDTH.search(name.lower()):
            wanted = int(width[1]) * MULTIPLES[width[2]]
            if not 0.9 * wanted <= sae.d_sae <= 1.1 * wanted:
                raise self._refusal("width in the name of the SAE", name, f"{sae.d_sae} features")
        if (place := re.search(r"(?<![a-z])(mlp|att|attn|transcoder)(?![a-z])", name)) and "resid" in sae.hook:
            raise self._refusal("place in the name of the SAE", place[1], f"the residual stream ({sae.hook})")

    def _refusal(self, what: str, found: Any, expected: Any) -> ExplanationError:
        return ExplanationError.mismatch(
            f"{what} in the explanations {self.source}", found=found, expected=expected,
            fix="They are of another SAE, whose ids mean other features: use the explanations of this one.",
        )  # fmt: skip


def read_explanations(source: str | Path) -> Explanations:
    """Read a file, or all files of a folder. Raises `ExplanationError`."""
    path = Path(source)
    files = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES)) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.name.endswith(SUFFIXES) for file in files):
        raise ExplanationError(
            f"no explanations at {path}: expected a file or a folder of files ending in {', '.join(SUFFIXES)}"
        )
    digest, kept, empty, rows = hashlib.sha256(), dict[tuple[int, str], Explanation](), 0, 0
    try:
        for file in files:
            digest.update(file.read_bytes())
            for row in _explanations(file):
                rows += 1
                if row.text:
                    kept.setdefault((row.feature, row.text.lower()), row)
                else:
                    empty += 1
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error, CorpusError) as error:
        raise ExplanationError(f"cannot read the explanations {path}: {error}") from error
    if not kept:
        raise ExplanationError(f"the explanations {path} hold no description: found {rows} rows, all of them empty")
    return Explanations(str(path), digest.hexdigest(), tuple(kept.values()), empty, rows - empty - len(kept))


def _explanations(file: Path) -> Iterator[Explanation]:
    for number, row in enumerate(_rows(file), 1):
        where = f"{file}, row {number}"
        feature = _first(row, ID_KEYS, where)
        text = _first(row, TEXT_KEYS, where)
        if not re.fullmatch(r"\d+", str(feature).strip()):
            raise ExplanationError(f"{where}: found the feature id {feature!r}, expected a whole number from 0")
        if text is not None and not isinstance(text, str):
            raise ExplanationError(f"{where}: found {type(text).__name__} as description, expected a text")
        by, model, layer, sae = (
            _text(row, *names) for names in (("by", "explanationModelName"), ("model", "modelId"), ("layer",), ("sae",))
        )
        yield Explanation(int(feature), " ".join((text or "").split()), by, model, layer, sae)


def _rows(file: Path) -> Iterable[Mapping[str, Any]]:
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        return read_rows(file)
    if file.suffix == ".json":
        return _json_rows(file)
    return _table_rows(file)


def _table_rows(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")


def _json_rows(file: Path) -> Sequence[Mapping[str, Any]]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ExplanationError(f"{file}: not JSON ({error})") from error
    rows = content.get("explanations") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ExplanationError(f'{file}: expected a list of objects, or {{"explanations": [...]}}')
    return rows


def _first(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    """The value under the first of these names that the row has."""
    for name in names:
        if name in row:
            return row[name]
    raise ExplanationError(f"{where}: found {sorted(map(str, row))}, expected one of {', '.join(names)}")


def _text(row: Mapping[str, Any], *names: str) -> str | None:
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), None)


def _same_model(said: str, model: str) -> bool:
    """Whether two names can mean one model: Neuronpedia's `gemma-2-2b` is also `google/gemma-2-2b-it`.

    A name without an owner is of a folder, which says nothing.
    """
    one, other = (re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower()) for name in (said, model))
    return "/" not in model or Path(model).exists() or one in other or other in one
