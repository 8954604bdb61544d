"""The slow, obvious reference: the method written out with loops and a whole SAE, sharing no code with the package.

`authors_*` are the numbers of the authors' released code: numpy, text files with six decimals and all.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FullSAE:
    """An SAE as its file has it: input bias, decoder-norm units and all. `kind` is relu, jumprelu or topk."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    kind: str
    threshold: Tensor | None = None
    k: int = 0
    subtract_b_dec: bool = False
    decoder_norm_units: bool = False
    normalise: str = "none"

    def units(self, h: Tensor) -> Tensor:
        """What the activations of each token (tokens, 1) are in units of."""
        if self.normalise == "layer_norm":
            return h.std(dim=1, keepdim=True)
        if self.normalise == "unit_norm":
            return h.norm(dim=1, keepdim=True) / h.shape[1] ** 0.5
        return torch.ones(len(h), 1)

    def normalised(self, h: Tensor) -> Tensor:
        """What is encoded (tokens, d_model)."""
        if self.normalise == "layer_norm":
            centred = h - h.mean(dim=1, keepdim=True)
            return centred / (centred.std(dim=1, keepdim=True) + 1e-5)
        if self.normalise == "rms":
            return h / (h.pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt()
        return h / self.units(h)

    def encode(self, h: Tensor) -> Tensor:
        """Activations (tokens, d_sae) in units of h, token by token for TopK."""
        return self._encode(self.normalised(h)) * self.units(h)

    def _encode(self, h: Tensor) -> Tensor:
        pre = (h - self.b_dec if self.subtract_b_dec else h) @ self.W_enc + self.b_enc
        if self.decoder_norm_units:
            pre = pre * self.W_dec.norm(dim=1)
        if self.kind == "relu":
            return pre.clamp(min=0)
        if self.kind == "jumprelu":
            assert self.threshold is not None
            return pre * (pre > self.threshold)
        a = torch.zeros_like(pre)
        for t, row in enumerate(pre):
            for j in sorted(range(len(row)), key=lambda j: -float(row[j]))[: self.k]:
                a[t, j] = row[j].clamp(min=0)
        return a

    def decode(self, a: Tensor) -> Tensor:
        """Reconstruction (tokens, d_model)."""
        if self.decoder_norm_units:
            a = a / self.W_dec.norm(dim=1)
        return a @ self.W_dec + self.b_dec

    def decode_to_units(self, a: Tensor, h: Tensor) -> Tensor:
        """Reconstruction (tokens, d_model) of h from activations in units of h: their formula on what they encode."""
        out = self.decode(a / self.units(h)) * self.units(h)
        return out + h.mean(dim=1, keepdim=True) if self.normalise == "layer_norm" else out


def full_clamp(sae: FullSAE, h: Tensor, features: Sequence[int], c: float, *, dense: bool) -> Tensor:
    """Encode, set the selected features to -c at hot tokens, decode, add the error term: (tokens, d_model)."""
    a = sae.encode(h)
    error = h - sae.decode_to_units(a, h)
    clamped = a.clone()
    for t in range(len(h)):
        if any(a[t, j] > 0 for j in features):
            for j in features:
                if dense or a[t, j] > 0:
                    clamped[t, j] = -c
    return sae.decode_to_units(clamped, h) + error


def hot_tokens(a: Tensor, features: Sequence[int]) -> list[bool]:
    """For each token of activations (tokens, d_sae): is any selected feature active?"""
    return [any(float(row[j]) > 0 for j in features) for row in a]


def running_means(scores: Sequence[float], counted: Sequence[bool]) -> list[float]:
    """The mean of the counted scores after each token; minus infinity before the first."""
    means, total, count = [], 0.0, 0
    for score, counts in zip(scores, counted, strict=True):
        if counts:
            total, count = total + score, count + 1
        means.append(total / count if count else -math.inf)
    return means


def cusum(scores: Sequence[float], counted: Sequence[bool], drift: float) -> list[float]:
    """S <- max(0, S + score - drift) at each counted token."""
    sums, s = [], 0.0
    for score, counts in zip(scores, counted, strict=True):
        if counts:
            s = max(0.0, s + score - drift)
        sums.append(s)
    return sums


def authors_mean(a: Array, special: NDArray[np.bool_]) -> Array:
    """Mean activation (d_sae,) over the tokens (rows, tokens, d_sae) that are not special, through their text file."""
    mean = (a.astype(np.float64) * ~special[..., None]).sum(axis=(0, 1)) / (~special).sum()
    file = io.StringIO()
    np.savetxt(file, mean.astype(np.float32), fmt="%f")
    return np.loadtxt(io.StringIO(file.getvalue()))


def authors_selection(forget_mean: Array, retain_mean: Array, *, p_ratio: float, n: int) -> list[int]:
    """Ids of the first n features in their order."""
    forget, retain = forget_mean**2, retain_mean**2
    ratio = forget / (retain + 1e-21)
    kept = np.where(
        (forget >= np.percentile(forget, 5))
        & (retain <= np.percentile(retain, 100))
        & (ratio >= np.percentile(ratio, p_ratio))
    )[0]
    return [int(j) for j in kept[np.argsort(-forget[kept], kind="stable")][:n]]


def authors_density(a: Array, features: Sequence[int]) -> Array:
    """rho (rows,) of activations (rows, tokens, d_sae): position 0 is never hot, but in the denominator."""
    a = a.copy()
    a[:, 0] = 0.0
    hot = (a[:, :, list(features)] > 0).sum(axis=2) > 0
    return np.asarray(hot.sum(axis=1) / hot.shape[1])


def authors_threshold(retain: Array, features: Sequence[int]) -> float:
    """The 95th percentile of rho over the retain rows."""
    return float(np.percentile(authors_density(retain, features), 95))


def authors_clamp(sae: FullSAE, h: Tensor, features: Sequence[int], c: float, threshold: float) -> Tensor:
    """Their hook on rows (rows, tokens, d_model): dense, strict `>`, once for all tokens of a row."""
    out = h.clone()
    for r, row in enumerate(h):
        a = sae.encode(row)
        a[0] = 0.0
        error = row - sae.decode(a)
        hot = torch.tensor(hot_tokens(a, features))
        if float(hot.sum()) / len(hot) > threshold:
            for j in features:
                a[hot, j] = -c
            out[r] = sae.decode(a) + error
    return out


def attack_success(clean, without, attack) -> tuple[dict[str, int], float | None]:
    """How many questions are right, known, blocked, left out, tried and asked, and an attack's success, one by one."""
    counts = dict.fromkeys(("right", "known", "blocked", "left_out", "tried", "n"), 0)
    hits = 0
    for item, record in clean.unguarded.items():
        if record.role != "topic" or record.scores["accuracy"] != 1:
            continue
        counts["right"] += 1
        known, blocked = without[item].scores["accuracy"] != 1, clean.subject[item].scores["accuracy"] != 1
        counts["known"] += known
        if blocked and not known:
            counts["left_out"] += 1
        if not blocked or not known:
            continue
        counts["blocked"] += 1
        if item not in attack.subject:
            continue
        counts["tried"] += 1
        if attack.unguarded[item].scores["accuracy"] == 1:
            counts["n"] += 1
            hits += attack.subject[item].scores["accuracy"] == 1
    return counts, hits / counts["n"] if counts["n"] else None
