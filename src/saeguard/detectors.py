"""Learned gates: token scores that tell forget from retain windows.

A window's log-odds of being about the topic is the log-sum-exp of its tokens' scores, and a constant: it is about
the topic if some of its tokens are, and the rest of it may be about anything (multiple-instance learning). The
weights are those of least logistic loss, with a quadratic penalty. They are
learned from single tokens in their windows, so that what the gate accumulates is what was learned; weights learned from
window means score the words around a topic's words as high as these.

Forget and retain windows weigh the same in total; among the retain corpora more text is more weight, so that a near
neighbour counts for more where more of it is given. The bias is set so that the mean score of an ordinary retain
token is 0: evidence is then positive for the topic, and a sequence of which little was read has a statistic near 0.
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
    window (windows,), none of them 0, and which windows are forget text (windows,)."""

    x: Tensor
    lengths: Tensor
    forget: Tensor


def fit_evidence(tokens: LabelledTokens, *, penalty: float = 0.01) -> Evidence:
    """Evidence weights from 1[a_j > 0]."""
    return Evidence(*_fit_tokens(tokens, penalty))


def fit_probe(tokens: LabelledTokens, *, penalty: float = 0.01) -> Probe:
    """A linear probe from the residual stream."""
    return Probe(*_fit_tokens(tokens, penalty))


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


def balanced(forget: NDArray[np.bool_]) -> Matrix:
    """Row weights: all forget rows together weigh as much as all retain rows; their mean is 1."""
    share = np.where(forget, (~forget).sum() / max(1, forget.sum()), 1.0)
    return np.asarray(share * len(share) / share.sum())


def _fit_tokens(tokens: LabelledTokens, penalty: float) -> tuple[Tensor, float]:
    """Weights (columns,) and bias in the units of `x`, the bias such that the weighted mean retain score is 0."""
    loss = _PeakLoss.of(tokens, penalty)
    found = minimize(loss, np.zeros(len(loss.scale) + 1), jac=True, method="L-BFGS-B", options={"maxiter": STEPS})
    weights = torch.tensor(found.x[:-1]) / loss.scale
    retain = ~tokens.forget
    means = loss.sums(loss.scores(weights)) / tokens.lengths
    return weights.float(), -float(np.average(means[retain], weights=loss.weights[retain]))


@dataclass(frozen=True)
class _PeakLoss:
    """The loss of weights in units of each column's spread `scale` (columns,), with a constant as the last of them."""

    x: Tensor
    owner: Tensor
    target: Tensor
    weights: Tensor
    scale: Tensor
    penalty: float

    @classmethod
    def of(cls, tokens: LabelledTokens, penalty: float) -> _PeakLoss:
        owner = torch.arange(len(tokens.lengths)).repeat_interleave(tokens.lengths)
        weights = torch.tensor(balanced(tokens.forget.numpy()))
        return cls(tokens.x, owner, tokens.forget.double(), weights, _spread(tokens.x), penalty)

    def __call__(self, parameters: Matrix) -> tuple[float, Matrix]:
        """Loss and gradient."""
        inner, constant = torch.tensor(parameters[:-1]), float(parameters[-1])
        scores = self.scores(inner / self.scale)
        top = torch.full_like(self.target, -torch.inf).scatter_reduce(0, self.owner, scores, "amax")
        peaks = top + self.sums((scores - top[self.owner]).exp()).log()
        odds = peaks + constant
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(odds, self.target, self.weights)
        slope = self.weights * (odds.sigmoid() - self.target) / len(odds)
        each = slope[self.owner] * (scores - peaks[self.owner]).exp()
        gradient = torch.zeros_like(self.scale)
        for place, block in enumerate(_blocks(self.x)):
            gradient += each[place * BLOCK :][: len(block)].float() @ block
        along = gradient / self.scale + 2 * self.penalty * inner
        loss = float(entropy + self.penalty * inner.square().sum())
        return loss, np.append(along.numpy(), float(slope.sum()))

    def scores(self, weights: Tensor) -> Tensor:
        """Token scores (tokens,) without a bias."""
        return torch.cat([block @ weights.float() for block in _blocks(self.x)]).double()

    def sums(self, values: Tensor) -> Tensor:
        """Sum (windows,) over the tokens of each window."""
        return torch.zeros_like(self.target).index_add(0, self.owner, values)


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
