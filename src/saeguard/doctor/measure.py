"""Rows to the figures of one layer: how the SAE rebuilds them, their norms, its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard.doctor.figures import ORDINARY, Features, Norms, Reconstruction
from saeguard.doctor.reading import Reading, Rows
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.statistics import FeatureStatistics

ENCODE_TOKENS = 512
DENSE_RATE = 0.5
MASSIVE_DIMENSION = 0.1
MASSIVE_DIMENSIONS = 3
ALIGNED_PERCENTILE = 0.99


@dataclass(frozen=True)
class Rebuilt:
    """Some rows and what the SAE made of each: squared error, cosine, number of active features; sums over features."""

    rows: Rows
    error: Tensor
    cosine: Tensor
    active: Tensor
    statistics: FeatureStatistics


def rebuild(sae: SparseAutoencoder, rows: Rows) -> Rebuilt:
    """Encode and decode, in blocks."""
    parts, statistics = [], FeatureStatistics.empty(sae.d_sae)
    for start in range(0, len(rows), ENCODE_TOKENS):
        block = rows[start : start + ENCODE_TOKENS]
        a = sae.encode(block.x)
        y_hat = decoded(sae, a, block.x)
        statistics = statistics.merge(FeatureStatistics.of(a))
        error = (block.y - y_hat).square().sum(dim=1)
        parts.append((error, torch.cosine_similarity(block.y, y_hat, dim=1), (a > 0).sum(dim=1)))
    error, cosine, active = (torch.cat(column) for column in zip(*parts, strict=True))
    return Rebuilt(rows, error, cosine, active, statistics)


def decoded(sae: SparseAutoencoder, a: Tensor, x: Tensor) -> Tensor:
    """The output for feature activations (tokens, d_sae), with the linear path where there is one."""
    return sae.decode(a) if sae.W_skip is None else sae.decode(a) + x @ sae.W_skip


def explained_variance(error: Tensor, y: Tensor) -> float:
    """1 - sum of squared errors (tokens,) over the variance of the targets (tokens, d); 0 where these do not vary."""
    variance = float((y - y.mean(dim=0)).square().sum()) if len(y) else 0.0
    return 1 - float(error.sum()) / variance if variance > 0 else 0.0


def ordinary_bound(rows: Rows) -> float:
    """The norm below which a token is ordinary."""
    return ORDINARY * float(rows.y.norm(dim=1).median())


def reconstruction(rebuilt: Sequence[Rebuilt], bound: float) -> Reconstruction:
    """The figures over all these rows; `bound` is the norm below which a token is ordinary."""
    y = torch.cat([part.rows.y for part in rebuilt])
    error = torch.cat([part.error for part in rebuilt])
    ordinary = y.norm(dim=1) < bound
    return Reconstruction(
        tokens=len(y),
        explained_variance=explained_variance(error, y),
        ordinary=explained_variance(error[ordinary], y[ordinary]),
        cosine=float(torch.cat([part.cosine for part in rebuilt]).mean()),
        l0=float(torch.cat([part.active for part in rebuilt]).float().mean()),
    )


def norms(rows: Rows, readings: Sequence[Reading]) -> Norms:
    """Norms of the valid tokens, and of the first and special ones that the readings met."""
    size = rows.y.norm(dim=1)
    low, median, high = size.quantile(torch.tensor([0.05, 0.5, 0.95], device=size.device)).tolist()
    centred = (rows.y - rows.y.mean(dim=0)).square()
    total = float(centred.sum()) or 1.0
    massive = size >= ordinary_bound(rows)
    shares = centred.sum(dim=0) / total
    top = shares.topk(min(MASSIVE_DIMENSIONS, len(shares)))
    special = torch.cat([reading.special for reading in readings])
    return Norms(
        median=median, low=low, high=high,
        first=float(torch.cat([reading.first for reading in readings]).median()),
        special=float(special.median()) if len(special) else None,
        massive_tokens=float(massive.float().mean()),
        massive_variance=float(centred[massive].sum()) / total,
        massive_dimensions={
            int(i): float(share) for share, i in zip(*top, strict=True) if share >= MASSIVE_DIMENSION
        },
    )  # fmt: skip


def features(sae: SparseAutoencoder, statistics: FeatureStatistics) -> Features:
    """Shares of silent and dense features, and how encoder and decoder belong together."""
    rate = statistics.firing_rate
    alignment, aligned = (None, None) if sae.hook != sae.hook_out else _alignment(sae)
    return Features(
        d_sae=sae.d_sae,
        tokens=statistics.count,
        silent=float((statistics.fired == 0).float().mean()),
        dense=float((rate > DENSE_RATE).float().mean()),
        alignment=alignment,
        aligned=aligned,
    )


def _alignment(sae: SparseAutoencoder) -> tuple[float, float]:
    columns = torch.nn.functional.normalize(sae.W_enc.T, dim=1)
    rows = torch.nn.functional.normalize(sae.W_dec, dim=1)
    own, others = (columns * rows).sum(dim=1), (columns * rows.roll(1, dims=0)).sum(dim=1)
    bar = others.sort().values[int(ALIGNED_PERCENTILE * (len(others) - 1))]
    return float(own.median()), float((own > bar).float().mean())


def total_statistics(rebuilt: Mapping[str, Rebuilt]) -> FeatureStatistics:
    """Over all texts."""
    total = next(iter(rebuilt.values())).statistics
    for part in list(rebuilt.values())[1:]:
        total = total.merge(part.statistics)
    return total
