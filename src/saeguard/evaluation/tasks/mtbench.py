"""`mtbench`: the 80 two-turn questions of MT-Bench (arXiv 2306.05685), graded one answer at a time by a judge.

Without a judge only the answers' form is reported: length, repetition, gibberish. With `runs` above 1 each question is
answered as often, at the benchmark's temperatures, and the spread over runs is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saeguard.corpus import read_rows
from saeguard.errors import CorpusError
from saeguard.evaluation.answers import is_gibberish, repetition
from saeguard.evaluation.generation import generate_answers
from saeguard.evaluation.judge import Judge
from saeguard.evaluation.statistics import Estimate
from saeguard.evaluation.subject import Opened
from saeguard.evaluation.task import Derived, Item, Measure, Record, Task, item_id
from saeguard.generate import prompt_ids

WARM = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
BATCH = 10
MEASURES = (
    Measure("grade", "mean", "the judge's grade, 1 to 10, mean of both turns", "knowledge"),
    Measure("length", "mean", "tokens in an answer"),
    Measure("repetition", "mean", "share of an answer's word pairs that stand in it before", "harm"),
    Measure("gibberish", "rate", "share of questions with an answer that is gibberish", "harm"),
)


@dataclass(frozen=True)
class Conversation(Item):
    """Two turns of a user, the reference answers (or none), and which of several runs this is."""

    turns: tuple[str, ...]
    references: tuple[str, ...]
    run: int

    @property
    def content(self) -> str:
        """The first turn."""
        return self.turns[0]


@dataclass(frozen=True)
class MTBench(Task):
    """Questions of `path` (`category`, `turns`, and perhaps `reference` in every row)."""

    path: Path
    judge: Judge | None = None
    runs: int = 1
    max_new_tokens: int = 256
    name: str = "mtbench"
    measures: tuple[Measure, ...] = field(default=MEASURES, init=False)
    whole: bool = field(default=True, init=False)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Judge, runs and the longest answer."""
        return {
            "judge": None if self.judge is None else [self.judge.url, self.judge.model], "runs": self.runs,
            "max_new_tokens": self.max_new_tokens,
        }  # fmt: skip

    def items(self) -> Sequence[Conversation]:
        """Every question once a run."""
        if not self.path.is_file():
            raise CorpusError(f"no such file: {self.path}")
        rows = list(read_rows(self.path))
        return [_conversation(row, run, self.path) for run in range(self.runs) for row in rows]

    def batches(self, tokenizer: Any, items: Sequence[Conversation]) -> list[list[Conversation]]:
        """Questions of one category and run together: they share a temperature and a seed."""
        groups: dict[tuple[int, str], list[Conversation]] = {}
        for item in items:
            groups.setdefault((item.run, item.domain), []).append(item)
        return [its[i : i + BATCH] for its in groups.values() for i in range(0, len(its), BATCH)]

    def run(self, it: Opened, batch: Sequence[Conversation], seed: int) -> list[Record]:
        """Hold the conversations, then have them graded."""
        torch.manual_seed(seed + batch[0].run)
        temperature = WARM.get(batch[0].domain, 0.0)
        talks: list[list[dict[str, str]]] = [[] for _ in batch]
        made = []
        for turn in range(max(len(item.turns) for item in batch)):
            for talk, item in zip(talks, batch, strict=True):
                talk.append({"role": "user", "content": item.turns[turn]})
            prompts = [prompt_ids(it.tokenizer, talk) for talk in talks]
            made.append(generate_answers(it, prompts, self.max_new_tokens, temperature=temperature))
            for talk, answer in zip(talks, made[-1], strict=True):
                talk.append({"role": "assistant", "content": answer.text})
        return [self._record(item, talk, its) for item, talk, *its in zip(batch, talks, *made, strict=True)]

    def derived(self, records: Sequence[Record], seed: int) -> list[Derived]:
        """How much the mean grade varies from run to run."""
        grades: dict[float, list[float]] = {}
        for record in records:
            if "grade" in record.scores:
                grades.setdefault(record.scores["run"], []).append(record.scores["grade"])
        if len(grades) < 2:
            return []
        means = np.array([np.mean(its) for its in grades.values()])
        value = float(means.var(ddof=1))
        meaning = f"variance of the mean grade over {len(means)} runs"
        return [Derived("variance over runs", "all", "far", meaning, Estimate(value, value, value, len(means)))]

    def _record(self, item: Conversation, talk: Sequence[Mapping[str, str]], made: Sequence[Any]) -> Record:
        texts = [answer.text for answer in made]
        scores = {
            "length": float(np.mean([answer.tokens for answer in made])),
            "repetition": float(np.mean([repetition(text) for text in texts])),
            "gibberish": float(any(map(is_gibberish, texts))),
            "run": float(item.run),
        }
        if self.judge is not None:
            grades = []
            for turn, text in enumerate(texts):
                before = "\n\n".join(f"{said['role'].title()}: {said['content']}" for said in talk[: 2 * turn + 1])
                grades.append(self.judge.grade(before, text, "".join(item.references[turn : turn + 1])))
            scores["grade"] = float(np.mean(grades))
        last = made[-1]
        shown = {"prompt": "\n\n".join(item.turns), "answer": "\n\n".join(texts), "reference": ""}
        return Record(item.id, item.domain, item.role, scores, last.triggered, last.statistic, shown)


def _conversation(row: Mapping[str, Any], run: int, path: Path) -> Conversation:
    turns, category = row.get("turns"), row.get("category")
    if not isinstance(turns, list) or not turns or not isinstance(category, str):
        raise CorpusError(f"{path}: expected a text `category` and a list of texts `turns` in every row")
    references = tuple(map(str, row.get("reference") or ()))
    return Conversation(item_id(*map(str, turns), str(run)), category, "far", tuple(map(str, turns)), references, run)
