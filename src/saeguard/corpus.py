"""Texts: from files to documents, and from documents to disjoint splits.

A corpus is a name and a way to read its documents once more from the start, so that a corpus larger
than memory is read as a stream. Files: `.txt` (a document a line), `.jsonl[.gz]` with `text`,
`.parquet` with `text`, or `hf:DATASET[:CONFIG]:SPLIT:COLUMN`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saeguard.errors import CorpusError, CorpusOverlapError

Role = Literal["forget", "retain"]
Split = Literal["fit", "calibration", "test"]
SPLIT_PATTERN: tuple[Split, ...] = (
    "fit", "calibration", "fit", "test", "fit", "calibration", "fit", "calibration", "fit", "test",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text of a corpus; `index` is its place among the corpus's distinct documents."""

    index: int
    text: str

    @property
    def split(self) -> Split:
        """Half of the documents fit, three tenths calibrate, two tenths test; by place, so shares are exact."""
        return SPLIT_PATTERN[self.index % len(SPLIT_PATTERN)]


@dataclass(frozen=True)
class CorpusSummary:
    """What one read of a corpus found."""

    documents: int
    characters: int
    duplicates: int
    fingerprint: str
    keys: frozenset[int]


@dataclass(frozen=True)
class Corpus:
    """A named set of documents with a role. `read` starts from the first document at each call."""

    name: str
    role: Role
    read: Callable[[], Iterable[str]]
    source: str = "(in memory)"

    @classmethod
    def of(cls, name: str, role: Role, source: str | Path | Sequence[str]) -> Corpus:
        """A corpus from a file, an `hf:` address or a list of texts."""
        if isinstance(source, str | Path):
            return cls(name, role, lambda: read_texts(str(source)), str(source))
        return cls(name, role, lambda: _checked(source, f"the {role} corpus {name!r}"))

    def documents(self) -> Iterator[Document]:
        """The distinct, non-blank documents. A repeated text counts once, so no split sees another's text."""
        seen: set[int] = set()
        for text in self.read():
            key = text_key(text)
            if text.strip() and key not in seen:
                yield Document(len(seen), text)
                seen.add(key)

    def summary(self) -> CorpusSummary:
        """Read the corpus once and describe it. Raises `CorpusError` where it holds no text."""
        digest, keys, characters, rows = hashlib.sha256(), set(), 0, 0
        for text in self.read():
            if not text.strip():
                continue
            rows += 1
            key = text_key(text)
            if key not in keys:
                keys.add(key)
                characters += len(text)
                digest.update(key.to_bytes(8, "big"))
        if not keys:
            raise CorpusError(f"the {self.role} corpus {self.name!r} ({self.source}) holds no text")
        return CorpusSummary(len(keys), characters, rows - len(keys), digest.hexdigest()[:16], frozenset(keys))


def text_key(text: str) -> int:
    """A 64-bit hash of a text without regard to case and white space."""
    words = " ".join(text.lower().split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")


def check_disjoint(forget: CorpusSummary, retain: dict[str, CorpusSummary]) -> None:
    """Refuse a retain corpus that shares documents with the forget corpus."""
    for name, summary in retain.items():
        shared = len(forget.keys & summary.keys)
        if shared:
            raise CorpusOverlapError(
                f"{shared} of {summary.documents} documents of the retain corpus {name!r} are also in the forget "
                "corpus. A text cannot be both forgotten and kept: remove it from one of them."
            )


def read_texts(source: str) -> Iterator[str]:
    """The texts of one file or `hf:` address, in order. Raises `CorpusError`."""
    if source.startswith("hf:"):
        yield from _checked(_read_hub(source), source)
        return
    path = Path(source)
    try:
        if not path.is_file():
            raise CorpusError(
                f"no such file: {path}. Expected .txt, .jsonl, .jsonl.gz, .parquet or hf:DATASET:SPLIT:COLUMN"
            )
        yield from _checked(_reader(path), source)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise CorpusError(f"cannot read {path}: {error}") from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a `.jsonl` or `.jsonl.gz` file. Raises `CorpusError` with the line's number."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise CorpusError(f"{path}, line {number}: found {type(row).__name__}, expected an object")
        yield row


def _reader(path: Path) -> Iterable[Any]:
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return (row.get("text") for row in read_rows(path))
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.name.endswith((".txt", ".txt.gz")):
        return _lines(path)
    raise CorpusError(f"{path}: unknown kind of file. Expected .txt, .jsonl, .jsonl.gz or .parquet")


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for line in lines:
            yield line.rstrip("\n")


def _read_parquet(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise CorpusError(f"reading {path} needs pyarrow: pip install 'saeguard[data]'") from error
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.column("text").to_pylist()
    except (arrow.ArrowException, KeyError, IndexError) as error:
        raise CorpusError(f"cannot read the column 'text' of {path}: {error}") from error


def _read_hub(source: str) -> Iterator[Any]:
    parts = source.split(":")[1:]
    if len(parts) not in (3, 4):
        raise CorpusError(f"{source}: expected hf:DATASET[:CONFIG]:SPLIT:COLUMN")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise CorpusError(f"reading {source} needs datasets: pip install 'saeguard[data]'") from error
    *names, split, column = parts
    try:
        for row in load_dataset(*names, split=split, streaming=True):
            yield row[column]
    except KeyError as error:
        raise CorpusError(f"cannot read {source}: found no column {error}") from error
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, DatasetsError, HfHubHTTPError) as error:
        raise CorpusError(f"cannot read {source}: {error}") from error


def _checked(texts: Iterable[Any], source: str) -> Iterator[str]:
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise CorpusError(f"{source}, row {number}: found {type(text).__name__}, expected a text under 'text'")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise CorpusError(
                f"{source}, row {number}: half of a surrogate pair, which is no text. Write the file again."
            )
        yield text
