"""ROUGE-L, by the library of that name: how much of a reference's words, in order, an answer holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saeguard.errors import EvaluationError


@dataclass(frozen=True)
class RougeL:
    """Longest common subsequence of words over the reference's length (recall), and its F1."""

    recall: float
    f1: float


class Rouge:
    """Scores answers. Raises `EvaluationError` where the library is not installed."""

    def __init__(self, *, stem: bool) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise EvaluationError("ROUGE needs rouge-score: pip install 'saeguard[eval]'") from error
        self._scorer: Any = RougeScorer(["rougeL"], use_stemmer=stem)

    def score(self, reference: str, answer: str) -> RougeL:
        """ROUGE-L of an answer."""
        found = self._scorer.score(reference, answer)["rougeL"]
        return RougeL(float(found.recall), float(found.fmeasure))
