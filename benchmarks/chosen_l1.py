"""Features chosen by an L1 penalty: for `chosen_features.py` and `chosen_clamp.py`.

Logistic regression of the topic's against all other windows of the fit split, both sides weighing the same, on the
share of a window's valid tokens at which each feature is active, in units of its spread or as it is. The penalty is the
strongest that leaves the wanted number of weights, found by bisection.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, vstack
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from saeguard.detectors import balanced
from saeguard.sae import SparseAutoencoder
from saeguard.shards import Shard

WEAKEST, STRONGEST = 10.0, 1e-5
"""Bounds of scikit-learn's C."""
HALVINGS = 30
Key = tuple[str, int]


@dataclass(frozen=True)
class Activity:
    """`shares` (windows, d_sae) of the tokens of each fit window at which each feature is active, and the document of
    each window."""

    shares: csr_array
    documents: Sequence[Key]

    @classmethod
    def of(cls, sae: SparseAutoencoder, shards: Iterable[Shard]) -> Activity:
        """Of all features of an SAE."""
        rows, documents = [], []
        for shard in shards:
            for window in shard.windows():
                hidden = window.hidden[window.masks.valid[0]].float()
                if window.split == "fit" and len(hidden):
                    rows.append(csr_array((sae.encode(hidden) > 0).double().mean(dim=0, keepdim=True).numpy()))
                    documents.append((window.corpus, window.document))
        return cls(vstack(rows, format="csr"), documents)

    def without(self, documents: Collection[Key]) -> Activity:
        """The same but for the windows of these documents."""
        kept = [place for place, key in enumerate(self.documents) if key not in documents]
        return Activity(self.shares[kept], [self.documents[place] for place in kept])

    def topic(self, name: str) -> NDArray[np.bool_]:
        """Which windows are of this corpus (windows,)."""
        return np.array([corpus == name for corpus, _ in self.documents])


def chosen(activity: Activity, topic: str, n: int, *, positive: bool, scaled: bool = True) -> dict[int, float]:
    """The weight of each of the n features of largest weight where n are left, by falling weight; `positive`: where n
    positive ones are left, and of those only."""
    forget = activity.topic(topic)
    fires = np.flatnonzero(activity.shares[forget].sum(axis=0) > 0)
    x = StandardScaler(with_mean=False, with_std=scaled).fit_transform(activity.shares[:, fires])
    low, high, best = np.log(STRONGEST), np.log(WEAKEST), np.zeros(len(fires))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        weights = _weights(x, forget, float(np.exp(middle)))
        left = int((weights > 0).sum() if positive else (weights != 0).sum())
        low, high, best = (middle, high, best) if left < n else (low, middle, weights)
        if left == n:
            break
    order = np.argsort(-(best if positive else np.abs(best)), kind="stable")[:n]
    return {int(fires[place]): float(best[place]) for place in order}


def _weights(x: csr_array, forget: NDArray[np.bool_], c: float) -> NDArray[np.float64]:
    # the solver penalises the constant too, hardly so where its column is large
    model = LogisticRegression(
        C=c, l1_ratio=1.0, solver="liblinear", intercept_scaling=100.0, tol=1e-4, max_iter=1000, random_state=0
    )
    model.fit(x, forget, balanced(forget))
    return np.asarray(model.coef_[0])
