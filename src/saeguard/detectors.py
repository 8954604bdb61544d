"""Learned gates: token scores that tell forget from retain windows.

The score is the sum of two that are learned apart, each divided by its spread over the tokens:

    of means    logistic regression on window means: what the whole of a window shows
    of tokens   least logistic loss where a window's log-odds are the log-sum-exp of its tokens' scores: a window is
                about the topic if some of its tokens are (multiple-instance learning), with a quadratic penalty

The first alone scores the words around a topic's words as high as these, the second alone fires at a neighbour's
single words; docs/results/quickstart.md compares them.

Forget and retain windows weigh the same in total; among the retain corpora more text is more weight, so that a near
neighbour counts for more where more of it is given, or where it is named (`near_retain`). The bias is set so that the
mean score of an ordinary retain token is 0: evidence is then positive for the topic, and a sequence of which little was
read has a statistic near 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from saeguard.gate import Evidence, Probe

Matrix = NDArray[np.float64]
STEPS = 60
PENALTY = 0.01
TINY = 1e-9
BLOCK = 8192  # tokens converted at once


@dataclass(frozen=True)
class LabelledWindows:
    """Window means, one row a window: `x` (windows, columns), the corpus and the document of each row."""

    x: Matrix
    forget: NDArray[np.bool_]
    corpus: Sequence[str]
    document: Sequence[int]


@dataclass(frozen=True)
class LabelledTokens:
    """Windows token by token: `x` (tokens, columns) of all windows, one after another, the number of tokens of each
    window (windows,), none of them 0, which windows are forget text (windows,), and how much each weighs beside others
    of its side (windows,), all the same by default."""

    x: Tensor
    lengths: Tensor
    forget: Tensor
    weights: Matrix | None = None


def fit_evidence(tokens: LabelledTokens) -> Evidence:
    """Evidence weights from 1[a_j > 0]."""
    return Evidence(*_fit(tokens, strength=0.1))


def fit_probe(tokens: LabelledTokens) -> Probe:
    """A linear probe from the residual stream."""
    return Probe(*_fit(tokens, strength=0.01))


def cross_fitted_scores(windows: LabelledWindows, *, regularisation: float = 0.1, folds: int = 5) -> Matrix:
    """Each window's log-odds of being about the topic, from a probe that never saw its document."""
    groups = [f"{name}/{document}" for name, document in zip(windows.corpus, windows.document, strict=True)]
    scores = cross_val_predict(
        _pipeline(regularisation), windows.x, windows.forget, groups=groups,
        cv=GroupKFold(min(folds, len(set(groups)))), method="decision_function",
        params={"logisticregression__sample_weight": balanced(windows.forget)},
    )  # fmt: skip
    return np.asarray(scores, dtype=np.float64)


def _pipeline(regularisation: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=2000))


def balanced(forget: NDArray[np.bool_], weights: Matrix | None = None) -> Matrix:
    """Row weights: all forget rows together weigh as much as all retain rows, each side as `weights` say; mean 1."""
    rows = np.ones(len(forget)) if weights is None else weights
    share = np.where(forget, rows * rows[~forget].sum() / max(TINY, rows[forget].sum()), rows)
    return np.asarray(share * len(share) / share.sum())


def _fit(tokens: LabelledTokens, *, strength: float) -> tuple[Tensor, float]:
    """Weights (columns,) and bias in the units of `x`, the bias such that the weighted mean retain score is 0.

    `strength` is scikit-learn's C, the inverse of the penalty on weights learned from means.
    """
    data = _Windows.of(tokens)
    parts = [_of_means(data, strength), _of_tokens(_PeakLoss(data, PENALTY))]
    weights = torch.stack([part / data.scores(part).std().clamp(min=TINY) for part in parts]).sum(dim=0)
    retain = data.target == 0
    means = data.sums(data.scores(weights)) / tokens.lengths
    return weights.float(), -float((means * data.weights)[retain].sum() / data.weights[retain].sum())


def _of_means(data: _Windows, strength: float) -> Tensor:
    x = (data.totals() / data.owner.bincount()[:, None]).numpy()
    pipeline = _pipeline(strength)
    pipeline.fit(x, data.target.numpy(), logisticregression__sample_weight=data.weights.numpy())
    return torch.tensor(pipeline[1].coef_[0] / pipeline[0].scale_)


def _of_tokens(loss: _PeakLoss) -> Tensor:
    scale = loss.data.scale
    found = minimize(loss, np.zeros(len(scale) + 1), jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    return torch.tensor(found.x[:-1]) / scale


@dataclass(frozen=True)
class _Windows:
    """Token values `x` (tokens, columns) with the window of each token; of each window whether it is forget text (1)
    and its weight; the spread `scale` (columns,) over the tokens."""

    x: Tensor
    owner: Tensor
    target: Tensor
    weights: Tensor
    scale: Tensor

    @classmethod
    def of(cls, tokens: LabelledTokens) -> _Windows:
        owner = torch.arange(len(tokens.lengths)).repeat_interleave(tokens.lengths)
        weights = torch.tensor(balanced(tokens.forget.numpy(), tokens.weights))
        return cls(tokens.x, owner, tokens.forget.double(), weights, _spread(tokens.x))

    def scores(self, weights: Tensor) -> Tensor:
        """Token scores (tokens,) without a bias."""
        return torch.cat([block @ weights.float() for block in _blocks(self.x)]).double()

    def sums(self, values: Tensor) -> Tensor:
        """Sum (windows,) over the tokens of each window."""
        return torch.zeros_like(self.target).index_add(0, self.owner, values)

    def totals(self) -> Tensor:
        """Sum (windows, columns) of the values of each window."""
        found = torch.zeros(len(self.target), self.x.shape[1], dtype=torch.float64)
        for owner, block in zip(torch.split(self.owner, BLOCK), _blocks(self.x), strict=True):
            found.index_add_(0, owner, block.double())
        return found

    def along(self, values: Tensor) -> Tensor:
        """Sum (columns,) of the tokens' values, each times a number (tokens,)."""
        found = torch.zeros_like(self.scale)
        for part, block in zip(torch.split(values.float(), BLOCK), _blocks(self.x), strict=True):
            found += part @ block
        return found


@dataclass(frozen=True)
class _PeakLoss:
    """The loss of weights in units of each column's spread, with a constant as the last of them."""

    data: _Windows
    penalty: float

    def __call__(self, parameters: Matrix) -> tuple[float, Matrix]:
        """Loss and gradient."""
        data, inner, constant = self.data, torch.tensor(parameters[:-1]), float(parameters[-1])
        scores = data.scores(inner / data.scale)
        top = torch.full_like(data.target, -torch.inf).scatter_reduce(0, data.owner, scores, "amax")
        peaks = top + data.sums((scores - top[data.owner]).exp()).log()
        odds = peaks + constant
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(odds, data.target, data.weights)
        slope = data.weights * (odds.sigmoid() - data.target) / len(odds)
        each = slope[data.owner] * (scores - peaks[data.owner]).exp()
        gradient = data.along(each) / data.scale + 2 * self.penalty * inner
        return float(entropy + self.penalty * inner.square().sum()), np.append(gradient.numpy(), float(slope.sum()))


def _spread(x: Tensor) -> Tensor:
    """Standard deviation (columns,) over the tokens; 1 where there is none."""
    total, squares = torch.zeros(2, x.shape[1], dtype=torch.float64)
    for block in _blocks(x):
        total, squares = total + block.sum(dim=0), squares + block.square().sum(dim=0)
    spread = (squares / len(x) - (total / len(x)) ** 2).clamp(min=0).sqrt()
    return torch.where(spread > 0, spread, 1.0)


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """`x` in float32, some rows at a time."""
    for start in range(0, len(x), BLOCK):
        yield x[start : start + BLOCK].float()
