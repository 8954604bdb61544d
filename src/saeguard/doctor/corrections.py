"""What would make the SAE fit better: another input scale, `b_dec` subtracted or not, another layer.

A trained SAE is near an optimum in each of these, so one of them explaining clearly more means that the SAE is not
used as it was trained. All trials are over the same ordinary tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from saeguard.doctor.figures import Cause, Corrections, Trial
from saeguard.doctor.measure import decoded, explained_variance, ordinary_bound
from saeguard.doctor.reading import Rows
from saeguard.sae.autoencoder import SparseAutoencoder

COARSE = [4.0**power for power in range(-5, 6)]
FINE = (2.0, 2**0.5, 2**0.25, 2**0.125)
ROWS = 256
"""Tokens in a trial: the gaps between layers are many times the noise (docs/doctor.md)."""


def corrections(sae: SparseAutoencoder, streams: Mapping[int, Rows], layer: int) -> Corrections:
    """Try everything. `streams` are the rows of the same tokens at each layer, `layer` the one examined."""
    picked = _spread(streams[layer])
    rows = streams[layer][picked]
    as_is = attempt(sae, rows, "none", 1.0)
    scale = best_scale(sae, rows, as_is)
    norm = _norm(rows) * (scale.value if scale.explained_variance > as_is.explained_variance else 1.0)
    trials = {
        other: _at_layer(sae, its[picked], other, norm)
        for other, its in streams.items()
        if bool(its.x.isfinite().all()) and bool(its.y.isfinite().all())
    }
    others = [trial for other, trial in trials.items() if other != layer]
    return Corrections(
        as_is=as_is,
        scale=scale,
        b_dec=_best_b_dec(sae, rows, as_is),
        layer=max(others, key=lambda trial: trial.explained_variance, default=as_is),
        by_layer={other: trial.explained_variance for other, trial in trials.items()},
    )


def attempt(sae: SparseAutoencoder, rows: Rows, cause: Cause, value: float, *, scale: float = 1.0) -> Trial:
    """The SAE on rows times `scale`, its output divided by it."""
    x = rows.x * scale
    a = sae.encode(x)
    error = (rows.y - decoded(sae, a, x) / scale).square().sum(dim=1)
    return Trial(cause, value, explained_variance(error, rows.y), float((a > 0).sum(dim=1).float().mean()))


def best_scale(sae: SparseAutoencoder, rows: Rows, as_is: Trial) -> Trial:
    """The input scale that explains most: powers of 4, then ever finer around the best."""
    best = replace(as_is, cause="scale")
    for scale in COARSE:
        best = _better(best, attempt(sae, rows, "scale", scale, scale=scale))
    for step in FINE:
        for scale in (best.value / step, best.value * step):
            best = _better(best, attempt(sae, rows, "scale", scale, scale=scale))
    return best


def _best_b_dec(sae: SparseAutoencoder, rows: Rows, as_is: Trial) -> Trial:
    if sae.hook != sae.hook_out:
        return as_is
    shift = sae.b_dec @ sae.W_enc
    trials = [attempt(replace(sae, b_enc=sae.b_enc + sign * shift), rows, "b_dec", sign) for sign in (-1.0, 1.0)]
    return _better(*trials)


def _at_layer(sae: SparseAutoencoder, rows: Rows, layer: int, norm: float) -> Trial:
    """The better of the rows as they are, and with their median norm brought to `norm`."""
    match = norm / max(_norm(rows), torch.finfo(torch.float32).tiny)
    return _better(*(attempt(sae, rows, "layer", layer, scale=scale) for scale in (1.0, match)))


def _better(first: Trial, second: Trial) -> Trial:
    """The one that explains more, the first of equals."""
    return second if second.explained_variance > first.explained_variance else first


def _norm(rows: Rows) -> float:
    return float(rows.x.norm(dim=1).median())


def _spread(rows: Rows) -> Tensor:
    """Places of at most `ROWS` ordinary tokens, evenly spread."""
    ordinary = (rows.y.norm(dim=1) < ordinary_bound(rows)).nonzero().flatten()
    places = torch.linspace(0, len(ordinary) - 1, min(ROWS, len(ordinary))).long()
    picked: Tensor = ordinary[places.to(ordinary.device)]
    return picked
