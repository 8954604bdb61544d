"""Which settings are tried when a method is tuned.

`paper` are the grids of arXiv 2504.08192 (tables 4 to 6, 8 and 9) where it has one for the method. `small` fits a
machine without a GPU: few steps on short windows, and 8 configurations of each method. It is what the catalogue has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from saeguard.baselines.weight_settings import (
    CRISP,
    DARE,
    NPO,
    RMU,
    SCRUB,
    SSD,
    GradientAscent,
    GradientDifference,
    Settings,
    SimNPO,
    TaskVector,
)

if TYPE_CHECKING:
    from saeguard.baselines.catalogue import Baseline

Axes = dict[str, tuple[Any, ...]]

PAPER: dict[type[Settings], Axes] = {
    GradientDifference: {"learning_rate": (1e-5, 5e-5), "retain_weight": (0.01, 0.1, 1.0, 5.0, 10.0)},
    NPO: {"retain_weight": (0.01, 0.1, 1.0), "beta": (0.1, 1.0), "retain_loss": ("nll", "kl")},
    RMU: {
        "coeff": (1.0, 5.0, 10.0, 20.0, 100.0, 200.0, 400.0, 500.0, 800.0, 1000.0),
        "retain_weight": (0.01, 0.1, 1.0, 10.0, 100.0, 300.0, 500.0),
        "batch": (4, 8), "steps": (400, 800), "learning_rate": (5e-6,),
    },
    SCRUB: {
        "forget_weight": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), "learning_rate": (1e-4, 1e-5, 5e-6),
        "batch": (4, 8), "steps": (400, 800),
    },
    SSD: {"threshold": (0.1, 0.25, 0.5, 1.0, 2.5, 5.0), "dampening": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)},
}  # fmt: skip

SHORT: Axes = {"steps": (30,), "batch": (4,), "max_tokens": (128,), "check_every": (10,)}
OFTEN = SHORT | {"check_every": (3,)}
SMALL: dict[type[Settings], Axes] = {
    GradientAscent: OFTEN | {"learning_rate": (2e-6, 5e-6, 1e-5, 2e-5), "keep_utility": (0.9, 0.7)},
    GradientDifference: SHORT | {"learning_rate": (3e-5, 1e-4), "retain_weight": (0.3, 1.0, 3.0, 10.0)},
    NPO: SHORT | {"learning_rate": (3e-5, 1e-4), "retain_weight": (1.0, 5.0), "beta": (0.1, 1.0)},
    SimNPO: SHORT | {"learning_rate": (3e-5, 1e-4), "retain_weight": (1.0, 5.0), "beta": (1.0, 2.5)},
    RMU: SHORT | {"learning_rate": (3e-4, 1e-3), "strength": (2.0, 8.0), "retain_weight": (1.0, 100.0)},
    SCRUB: SHORT | {"learning_rate": (3e-5, 1e-4), "forget_weight": (1e-2, 1e-1, 1.0, 10.0)},
    CRISP: SHORT | {"learning_rate": (5e-4, 2e-3), "beta": (0.9, 0.99), "features": (10, 40)},
    TaskVector: SHORT | {"learning_rate": (1e-4,), "scale": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)},
    DARE: SHORT | {"learning_rate": (1e-4,), "scale": (0.5, 1.0, 1.5, 2.0), "rate": (0.5, 0.9)},
    SSD: {"max_tokens": (128,), "threshold": (10.0, 50.0, 250.0, 1000.0), "dampening": (0.1, 0.5)},
}  # fmt: skip


def with_grid(baseline: Baseline, preset: Literal["paper", "small"]) -> Baseline:
    """A method with the values of a preset, where there are any for it."""
    return replace(baseline, grid=PAPER.get(baseline.settings, baseline.grid)) if preset == "paper" else baseline
