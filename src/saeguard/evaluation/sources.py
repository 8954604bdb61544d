"""Where items come from: question and text files, the hub, the starter set, and which domains are near which topic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeguard.choices import Role
from saeguard.corpus import Corpus, read_rows
from saeguard.errors import CorpusError
from saeguard.evaluation.mcq import Question, question_of, read_questions

WMDP, MMLU = "cais/wmdp", "cais/mmlu"
NEIGHBOURS: Mapping[str, tuple[str, ...]] = {
    "wmdp-bio": ("college_biology", "high_school_biology", "anatomy", "virology", "medical_genetics",
                 "college_medicine"),
    "wmdp-cyber": ("computer_security", "college_computer_science", "high_school_computer_science",
                   "machine_learning"),
    "wmdp-chem": ("college_chemistry", "high_school_chemistry", "conceptual_physics", "nutrition"),
}  # fmt: skip
"""Benign MMLU subjects on topics next to a hazardous one."""
FAR = ("high_school_us_history", "high_school_geography", "human_aging", "sociology", "philosophy", "marketing")
"""MMLU subjects far from all of them; the first three are the paper's."""


@dataclass(frozen=True)
class QuestionSet:
    """Named questions with their role."""

    name: str
    role: Role
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class TextSet:
    """Named texts with their role."""

    name: str
    role: Role
    corpus: Corpus


def question_set(name: str, role: Role, source: str) -> QuestionSet:
    """Questions of a file, `FILE#SUBJECT` (rows of that `subject`), or `hf:DATASET[:CONFIG]:SPLIT`.

    Raises `CorpusError`, also for a set that holds no question.
    """
    if source.startswith("hf:"):
        rows = enumerate(_hub_rows(source), 1)
        questions = [question_of(row, f"{source}, question {number}") for number, row in rows]
    else:
        file, _, subject = source.partition("#")
        questions = _file_questions(Path(file), subject)
    if not questions:
        raise CorpusError(f"{source} holds no question")
    return QuestionSet(name, role, tuple(questions))


def benchmark(name: str, data: str | None) -> list[QuestionSet]:
    """Topic, near and far sets of a WMDP topic, from the hub, or from `data`: a folder with `wmdp` and `mmlu` laid out
    as on the hub, or as one `.jsonl[.gz]` file each with a `subject` in every row."""
    topic = question_set(name, "topic", _locate(WMDP, name, data))
    near = [question_set(subject, "near", _locate(MMLU, subject, data)) for subject in NEIGHBOURS[name]]
    far = [question_set(subject, "far", _locate(MMLU, subject, data)) for subject in FAR]
    return [topic, *near, *far]


def _locate(repo: str, config: str, data: str | None) -> str:
    if data is None:
        return f"hf:{repo}:{config}:test"
    folder = Path(data) / repo.split("/")[1]
    found = sorted((folder / config).glob("test*.parquet")) + sorted(folder.glob(f"{config}.jsonl*"))
    if found:
        return str(found[0])
    whole = sorted(folder.glob("*test*.jsonl*"))
    if whole:
        return f"{whole[0]}#{config}"
    raise CorpusError.mismatch(
        f"files of {config} in {folder}", found="none", fix="Or leave out --data to take it from the hub.",
        expected=f"{config}/test*.parquet, {config}.jsonl[.gz], or one *test*.jsonl[.gz] with `subject` in every row",
    )  # fmt: skip


def _file_questions(path: Path, subject: str) -> list[Question]:
    if path.suffix == ".parquet":
        rows: Iterator[dict[str, Any]] = _parquet_rows(path)
    elif not subject:
        return read_questions(path)
    elif not path.is_file():
        raise CorpusError(f"no such file: {path}")
    else:
        rows = read_rows(path)
    return [
        question_of(row, f"{path}, question {number}")
        for number, row in enumerate(rows, 1)
        if not subject or row.get("subject") == subject
    ]


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise CorpusError(f"reading {path} needs pyarrow: pip install 'saeguard[data]'") from error
    try:
        yield from parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise CorpusError(f"cannot read {path}: {error}") from error


def _hub_rows(source: str) -> Iterator[dict[str, Any]]:
    parts = source.split(":")[1:]
    if len(parts) not in (2, 3):
        raise CorpusError(f"{source}: expected hf:DATASET[:CONFIG]:SPLIT")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise CorpusError(f"reading {source} needs datasets: pip install 'saeguard[data]'") from error
    *names, split = parts
    try:
        yield from map(dict, load_dataset(*names, split=split, streaming=True))
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, DatasetsError, HfHubHTTPError) as error:
        raise CorpusError(
            f"cannot read {source}: {error}. Give local files instead: NAME=FILE, or --data DIR for a benchmark."
        ) from error
