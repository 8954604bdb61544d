"""Retain text that looks like the topic, and forget text that looks like none.

Varied retain text contains the topic (an encyclopedia's article on exoplanets), and one such passage can set a
worst-case threshold. Each document gets a score from a probe that never saw it (cross-fitted log-odds of its
window means). The rule: a retain document is an outlier if it scores at or above the median forget document; a
forget document if it scores at or below the median retain document. Outliers are left out of fitting and
calibration, never of the test split, and are always listed.

The rule takes few forget documents, as the probe has learned from the others like them. So their share that scores no
higher than the highest twentieth of retain documents is told too (docs/gates.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np

from saeguard.calibration import Rate, rate_above
from saeguard.detectors import cross_fitted_scores
from saeguard.sample import FORGET, ReadWindow, labelled_means

LISTED = 20
EXCERPT = 160
HIGHEST = 0.05


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
    """All documents by falling suspicion (retain first), the scores an outlier reaches, and how many forget documents
    score no higher than the highest twentieth of retain documents."""

    suspects: tuple[Suspect, ...]
    retain_bound: float
    forget_bound: float
    forget_among_retain: Rate

    @property
    def outliers(self) -> frozenset[tuple[str, int]]:
        """Keys of the documents that the rule quarantines."""
        return frozenset((s.corpus, s.document) for s in self.suspects if s.outlier)

    @property
    def shares(self) -> dict[str, Rate]:
        """By corpus, how many of its documents are outliers; corpora without any are left out."""
        flags: dict[str, list[bool]] = {}
        for suspect in self.suspects:
            flags.setdefault(suspect.corpus, []).append(suspect.outlier)
        return {name: Rate(sum(its), len(its)) for name, its in sorted(flags.items()) if any(its)}

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
            "forget_among_retain": self.forget_among_retain.as_dict(),
            "shares": {name: share.as_dict() for name, share in self.shares.items()},
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
    topic = [value for (corpus, _), value in averages.items() if corpus == FORGET]
    other = [value for (corpus, _), value in averages.items() if corpus != FORGET]
    forget_median, retain_median = median(topic), median(other)
    above = rate_above(topic, float(np.quantile(other, 1 - HIGHEST)))
    suspects = []
    for key, value in averages.items():
        forget = key[0] == FORGET
        outlier = value <= retain_median if forget else value >= forget_median
        text = (min if forget else max)(documents[key])[1]
        suspects.append(Suspect(*key, value, " ".join(text.split())[:EXCERPT], outlier))
    suspects.sort(key=lambda s: s.score if s.corpus == FORGET else -s.score)
    among = Rate(above.n - above.hits, above.n)
    return Contamination(tuple(suspects), forget_median, retain_median, among)
