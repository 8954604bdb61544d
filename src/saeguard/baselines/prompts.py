"""Classifiers of prompts by their text alone, which never look at the guarded model.

    tfidf       words and word pairs, term frequency damped, inverse document frequency, rows of length 1 (scikit-learn)
    embedding   the vector of a sentence-embedding model (the extra `semantic`)

Either goes into a logistic regression; the score is the log-odds of the topic. Forget and retain texts weigh the same
in total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import Tensor

from saeguard.explain.matching import sentence_encoder

FOLDS = 5
MIN_TEXTS = 2
"""In how many texts a word must stand."""


@dataclass(frozen=True)
class Tfidf:
    """Words and word pairs with their inverse document frequencies (columns,)."""

    terms: tuple[str, ...]
    idf: Tensor

    @classmethod
    def of(cls, texts: Sequence[str]) -> Tfidf:
        """The terms of some texts."""
        found = _vectorizer(min_df=MIN_TEXTS).fit(texts)
        return cls(tuple(found.get_feature_names_out()), torch.tensor(found.idf_, dtype=torch.float32))

    def rows(self, texts: Sequence[str]) -> Any:
        """One row a text, as a sparse matrix."""
        return self._vectorizer.transform(texts)

    @cached_property
    def _vectorizer(self) -> TfidfVectorizer:
        made = _vectorizer(vocabulary={term: column for column, term in enumerate(self.terms)})
        made.idf_ = self.idf.double().numpy()
        return made


@dataclass(frozen=True)
class Sentences:
    """A sentence-embedding model: a hub id or a folder."""

    model: str

    def rows(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """One row a text. Raises `ExplanationError` where the model cannot be had."""
        return np.asarray(
            self._encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False), dtype=np.float64
        )

    @cached_property
    def _encoder(self) -> Any:
        return sentence_encoder(self.model)


@dataclass(frozen=True)
class Classifier:
    """Weights (columns,) over the rows of a text, and a bias."""

    vectors: Tfidf | Sentences
    weights: Tensor
    bias: float

    def scores(self, texts: Sequence[str]) -> list[float]:
        """The log-odds of the topic of each text."""
        found: list[float] = (self.vectors.rows(texts) @ self.weights.double().numpy() + self.bias).tolist()
        return found


def fit_classifier(
    vectors: Tfidf | Sentences, texts: Sequence[str], forget: Sequence[bool], regularisation: float
) -> Classifier:
    """Learn which texts are about the topic; `regularisation` is scikit-learn's C, larger is freer."""
    found = _regression(regularisation).fit(vectors.rows(texts), np.asarray(forget))
    return Classifier(vectors, torch.tensor(found.coef_[0], dtype=torch.float32), float(found.intercept_[0]))


def cross_fitted(
    texts: Sequence[str], forget: Sequence[bool], documents: Sequence[str], regularisation: float
) -> NDArray[np.float64]:
    """Each text's score by a TF-IDF classifier that never saw its document."""
    scores = cross_val_predict(
        _regression(regularisation), Tfidf.of(texts).rows(texts), np.asarray(forget), groups=documents,
        cv=GroupKFold(min(FOLDS, len(set(documents)))), method="decision_function",
    )  # fmt: skip
    return np.asarray(scores, dtype=np.float64)


def _vectorizer(**options: Any) -> TfidfVectorizer:
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)


def _regression(regularisation: float) -> LogisticRegression:
    return LogisticRegression(C=regularisation, max_iter=2000, class_weight="balanced")
