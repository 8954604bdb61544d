"""The figures of a diagnosis, as numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ORDINARY = 2.0
"""An ordinary token's residual norm is below this many median norms. In many models a few tokens (the first, some
punctuation) have ten times the norm of all others in one or two dimensions: they are most of the variance and easy
to explain, so that an SAE which has lost everything else still looks well with them."""


@dataclass(frozen=True)
class Reconstruction:
    """How an SAE rebuilds some tokens: 1 - sum |h - h_hat|^2 / sum |h - mean h|^2, over all valid tokens and over the
    ordinary ones; mean cosine of h and h_hat; mean number of active features, L0."""

    tokens: int
    explained_variance: float
    ordinary: float
    cosine: float
    l0: float


@dataclass(frozen=True)
class Norms:
    """Norms of the residual stream: median, 5th and 95th percentile of valid tokens; medians of the first tokens and of
    other special tokens, where there are any. Massive tokens are the valid ones that are not ordinary: their share,
    their share of the variance, and the dimensions (at most three) that hold a tenth of all variance or more."""

    median: float
    low: float
    high: float
    first: float
    special: float | None
    massive_tokens: float
    massive_variance: float
    massive_dimensions: Mapping[int, float]


@dataclass(frozen=True)
class Features:
    """Shares of the features that never fired, and that fired on more than half of the tokens. `alignment` is the
    median cosine of a feature's encoder column with its decoder row, `aligned` the share of features in which it is
    above all but a hundredth of those with another feature's row. None where input and output are not one space."""

    d_sae: int
    tokens: int
    silent: float
    dense: float
    alignment: float | None
    aligned: float | None


Cause = Literal["none", "scale", "b_dec", "layer"]


@dataclass(frozen=True)
class Trial:
    """The SAE tried with one thing changed: the scale of its input, its `b_dec` subtracted (-1) or added (1) before the
    encoder, or another layer. Over ordinary tokens."""

    cause: Cause
    value: float
    explained_variance: float
    l0: float


@dataclass(frozen=True)
class Corrections:
    """The SAE as it is, the best trial of each kind, and the explained variance at each layer, norms matched."""

    as_is: Trial
    scale: Trial
    b_dec: Trial
    layer: Trial
    by_layer: Mapping[int, float]


@dataclass(frozen=True)
class Precision:
    """The same tokens with the model in another dtype: active features in common over active in either (Jaccard index),
    over all features and over those that a guardrail would select; the same with activations as weights."""

    dtype: str
    other: str
    jaccard: float
    selected: float | None
    weighted: float


@dataclass(frozen=True)
class Figures:
    """Everything measured. `texts` is by name, `whole` over all of them, `chat` over some of them in the chat template.
    `loss_recovered` and `precision` are None and empty where they were not measured."""

    texts: Mapping[str, Reconstruction]
    whole: Reconstruction
    chat: Reconstruction | None
    norms: Norms
    features: Features
    declared_l0: float | None
    corrections: Corrections
    loss_recovered: float | None
    precision: tuple[Precision, ...]
