"""Unfinished work: the records of every finished batch, a line each, in a file named by what they depend on.

A run that is killed loses the batch it was in, nothing else. A last line that was cut off is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saeguard.errors import EvaluationError
from saeguard.evaluation.task import Record


class Ledger:
    """The finished batches of one task on one subject."""

    def __init__(self, folder: Path | None, identity: Any) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self._path = None if folder is None else folder / f"{key}.jsonl"
        self._done = {} if self._path is None else _read(self._path)

    def __contains__(self, batch: int) -> bool:
        return batch in self._done

    def add(self, batch: int, records: Sequence[Record]) -> None:
        """Keep a finished batch. Raises `EvaluationError` where it cannot be written."""
        self._done[batch] = list(records)
        if self._path is None:
            return
        line = json.dumps({"batch": batch, "records": [asdict(record) for record in records]})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise EvaluationError(f"cannot write to the work folder {self._path.parent}: {error}") from error

    def records(self) -> list[Record]:
        """All records, in the order of the batches."""
        return [record for _, records in sorted(self._done.items()) for record in records]


def _read(path: Path) -> dict[int, list[Record]]:
    """The whole lines of a work file; what follows a torn one is cut away."""
    try:
        raw = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise EvaluationError(f"cannot read the work file {path}: {error}") from error
    found, good = {}, 0
    for line in raw.splitlines(keepends=True):
        try:
            entry = json.loads(line)
            found[entry["batch"]] = [Record(**record) for record in entry["records"]]
        except (ValueError, KeyError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        good += len(line)
    if good < len(raw):
        found = _read_prefix(path, raw[:good])
    return found


def _read_prefix(path: Path, whole: bytes) -> dict[int, list[Record]]:
    path.write_bytes(whole)
    return _read(path)
