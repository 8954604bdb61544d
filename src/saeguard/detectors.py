"""Learned gates: logistic regression of forget against retain windows (scikit-learn), folded to one vector.

Forget and retain rows weigh the same in total; among the retain corpora more text is more weight, so that a near
neighbour counts for more where more of it is given. The bias is set so that the mean score of an ordinary retain
token is 0: evidence is then positive for the topic, and a sequence of which little was read has a statistic near 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from saeguard.gate import Evidence, Probe

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class LabelledWindows:
    """Window means, one row a window: `x` (windows, columns), the corpus and the document of each row."""

    x: Matrix
    forget: NDArray[np.bool_]
    corpus: Sequence[str]
    document: Sequence[int]

    def weights(self) -> Matrix:
        """Row weights: all forget rows together weigh as much as all retain rows; their mean is 1."""
        share = np.where(self.forget, (~self.forget).sum() / max(1, self.forget.sum()), 1.0)
        return np.asarray(share * len(share) / share.sum())


def fit_evidence(windows: LabelledWindows, *, regularisation: float = 0.1) -> Evidence:
    """Evidence weights from window means of 1[a_j > 0]."""
    weights, bias = _linear(windows, regularisation)
    return Evidence(torch.tensor(weights, dtype=torch.float32), bias)


def fit_probe(windows: LabelledWindows, *, regularisation: float = 0.01) -> Probe:
    """A linear probe from window means of the residual stream."""
    weights, bias = _linear(windows, regularisation)
    return Probe(torch.tensor(weights, dtype=torch.float32), bias)


def cross_fitted_scores(windows: LabelledWindows, *, regularisation: float = 0.1, folds: int = 5) -> Matrix:
    """Each window's log-odds of being about the topic, from a probe that never saw its document."""
    groups = [f"{name}/{document}" for name, document in zip(windows.corpus, windows.document, strict=True)]
    scores = cross_val_predict(
        _pipeline(regularisation), windows.x, windows.forget, groups=groups,
        cv=GroupKFold(min(folds, len(set(groups)))), method="decision_function",
        params={"logisticregression__sample_weight": windows.weights()},
    )  # fmt: skip
    return np.asarray(scores, dtype=np.float64)


def _pipeline(regularisation: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=2000))


def _linear(windows: LabelledWindows, regularisation: float) -> tuple[Matrix, float]:
    """Weights and bias in the units of `x`, the bias such that the weighted mean retain score is 0."""
    pipeline = _pipeline(regularisation)
    pipeline.fit(windows.x, windows.forget, logisticregression__sample_weight=windows.weights())
    scaler, regression = pipeline[0], pipeline[1]
    weights = regression.coef_[0] / scaler.scale_
    retain = ~windows.forget
    mean = np.average(windows.x[retain], axis=0, weights=windows.weights()[retain])
    return weights, -float(mean @ weights)
