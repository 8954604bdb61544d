"""Features by their explanations: which of them speak of something, best first.

    by words      the cosine of TF-IDF vectors (scikit-learn). A word is matched whole, whatever its case; a plural `s`
                  is left off, and English words of no topic are passed over
    by meaning    the cosine of sentence embeddings; sentence-transformers is the extra `semantic`

A match says that somebody described a feature so. Whether the feature acts so is measured afterwards, by `fit`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

from saeguard.choices import GivenFeatures
from saeguard.errors import ExplanationError
from saeguard.explain.explanations import Explanation, Explanations


@dataclass(frozen=True)
class Match:
    """A feature, how near its explanation is to what was asked (a cosine), and the explanation."""

    feature: int
    score: float
    text: str


def by_words(rows: Sequence[Explanation], about: str, *, all_words: bool = False) -> list[Match]:
    """The features whose explanation has one of the words (or all of them), best first. Raises `ExplanationError`."""
    wanted = set(_words(about))
    if not wanted:
        raise ExplanationError(f"found no word to search for in {about!r}: name the topic in a few words")
    vectors = TfidfVectorizer(analyzer=_words)
    documents = vectors.fit_transform([row.text for row in rows])
    scores = (documents @ vectors.transform([about]).T).toarray()[:, 0]
    if all_words:
        scores *= [wanted <= set(_words(row.text)) for row in rows]
    return _ranked(rows, scores)


def by_meaning(rows: Sequence[Explanation], about: str, model: str) -> list[Match]:
    """The features by how near their explanation is in meaning, all of them, best first. Raises `ExplanationError`.

    `model` is a sentence-embedding model: a hub id or a folder.
    """
    encoder = sentence_encoder(model)
    vectors = encoder.encode([about, *(row.text for row in rows)], normalize_embeddings=True, show_progress_bar=False)
    return _ranked(rows, np.asarray(vectors[1:] @ vectors[0], dtype=np.float64))


def given(matches: Sequence[Match], explanations: Explanations, about: str, method: str) -> GivenFeatures:
    """The matched features for `fit`, with what they were found by."""
    return GivenFeatures(
        ids=tuple(match.feature for match in matches),
        explanations={match.feature: match.text for match in matches},
        origin={
            "by": "explanations", "about": about, "method": method,
            "file": explanations.source, "sha256": explanations.sha256,
            "scores": {str(match.feature): round(match.score, 4) for match in matches},
        },
    )  # fmt: skip


def _words(text: str) -> list[str]:
    """The words of a text in lower case, without those of no topic and without a plural `s`."""
    found = re.findall(r"\w+", text.lower())
    kept = (word for word in found if word not in ENGLISH_STOP_WORDS)
    return [word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word for word in kept]


def _ranked(rows: Sequence[Explanation], scores: NDArray[np.float64]) -> list[Match]:
    """One match a feature, by its best explanation, where that scores above 0; of equals the lower id first."""
    best: dict[int, Match] = {}
    for row, score in zip(rows, scores.tolist(), strict=True):
        if score > 0 and (row.feature not in best or score > best[row.feature].score):
            best[row.feature] = Match(row.feature, score, row.text)
    return sorted(best.values(), key=lambda match: (-match.score, match.feature))


def sentence_encoder(model: str) -> Any:
    """A sentence-embedding model by hub id or folder. Raises `ExplanationError`."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ExplanationError(
            "sentence embeddings need sentence-transformers: pip install 'saeguard[semantic]'"
        ) from error
    try:
        return SentenceTransformer(model)
    except (OSError, ValueError, KeyError) as error:
        raise ExplanationError(f"cannot load the sentence-embedding model {model}: {error}") from error
