"""Retain text that looks like the topic, and forget text that looks like none.

Varied retain text contains the topic (an encyclopedia's article on exoplanets), and one such passage can set a
worst-case threshold. Each document gets a score from a probe that never saw it (cross-fitted log-odds of its
window means). The rule: a retain document is an outlier if it scores at or above the median forget document; a
forget document if it scores at or below the median retain document. Outliers are left out of fitting and
calibration, never of the test split, and are always listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Protocol

from saeguard.detectors import cross_fitted_scores
from saeguard.sample import FORGET, ReadWindow, labelled_means

LISTED = 20
EXCERPT = 160


@dataclass(frozen=True)
class Suspect:
    """A document, its highest-scoring window's score and the start of that window."""

    corpus: str
    document: int
    score: float
    text: str
    outlier: bool


@dataclass(frozen=True)
class Contamination:
    """Suspects by falling suspicion (retain first), and the scores an outlier reaches."""

    suspects: tuple[Suspect, ...]
    retain_bound: float
    forget_bound: float

    @property
    def outliers(self) -> frozenset[tuple[str, int]]:
        """Keys of the documents that the rule quarantines."""
        return frozenset((s.corpus, s.document) for s in self.suspects if s.outlier)

    def as_dict(self) -> dict[str, Any]:
        """For the artifact: all outliers, and the nearest others up to `LISTED` a side."""
        listed = [suspect for suspect in self.suspects if suspect.outlier]
        for forget_side in (False, True):
            side = [s for s in self.suspects if (s.corpus == FORGET) == forget_side and not s.outlier]
            listed += side[: max(0, LISTED - sum((s.corpus == FORGET) == forget_side for s in listed))]
        return {
            "rule": "retain documents scoring at or above the median forget document, forget documents scoring at "
            "or below the median retain document (cross-fitted)",
            "retain_bound": self.retain_bound,
            "forget_bound": self.forget_bound,
            "quarantined": len(self.outliers),
            "listed": [asdict(suspect) for suspect in listed],
        }


class Titled(Protocol):
    """A piece of a document, which `key` names by corpus and number."""

    @property
    def key(self) -> tuple[str, int]: ...
    @property
    def text(self) -> str: ...


def find_contamination(windows: Sequence[ReadWindow]) -> Contamination:
    """Score the documents of the fit and calibration splits by the residual stream, and find the outliers."""
    return contamination(windows, cross_fitted_scores(labelled_means(windows)).tolist())


def contamination(windows: Sequence[Titled], scores: Sequence[float]) -> Contamination:
    """The outliers by the cross-fitted scores of the windows."""
    documents: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for window, score in zip(windows, scores, strict=True):
        documents.setdefault(window.key, []).append((score, window.text))
    averages = {key: sum(score for score, _ in found) / len(found) for key, found in documents.items()}
    forget_median = median(value for (corpus, _), value in averages.items() if corpus == FORGET)
    retain_median = median(value for (corpus, _), value in averages.items() if corpus != FORGET)
    suspects = []
    for key, value in averages.items():
        forget = key[0] == FORGET
        outlier = value <= retain_median if forget else value >= forget_median
        text = (min if forget else max)(documents[key])[1]
        suspects.append(Suspect(*key, value, " ".join(text.split())[:EXCERPT], outlier))
    suspects.sort(key=lambda s: s.score if s.corpus == FORGET else -s.score)
    return Contamination(tuple(suspects), forget_median, retain_median)
