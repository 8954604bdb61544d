"""Every choice of the weight-changing methods with its default and help text. Nothing heavy is imported here.

Names follow the papers where they agree; `grids.py` has the values that are tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saeguard.options import option


@dataclass(frozen=True)
class Training:
    """What all methods share that are trained."""

    learning_rate: float = option(1e-5, "learning rate, constant")
    steps: int = option(400, "optimiser steps")
    batch: int = option(8, "forget windows, and as many retain windows, in a step")
    accumulate: int = option(1, "parts in which a batch is computed, to save memory")
    max_tokens: int = option(256, "tokens of a window")
    lora_rank: int = option(0, "rank of LoRA adapters; 0: the weights themselves are trained")
    check_every: int = option(20, "steps between checkpoints, at which the stopping rule looks")
    keep_utility: float = option(
        0.9, "stop when held-out retain text gets less than this share of its probability a token; 0: never"
    )


@dataclass(frozen=True)
class GradientAscent(Training):
    """`gradient_ascent.py`."""


@dataclass(frozen=True)
class GradientDifference(Training):
    """`gradient_difference.py`."""

    forget_weight: float = option(1.0, "weight of the forget part (gamma)")
    retain_weight: float = option(1.0, "weight of the retain part (beta)")


@dataclass(frozen=True)
class NPO(Training):
    """`npo.py`."""

    beta: float = option(0.1, "inverse temperature: towards 0 it is gradient ascent")
    forget_weight: float = option(1.0, "weight of the forget part (gamma)")
    retain_weight: float = option(1.0, "weight of the retain part (alpha)")
    retain_loss: Literal["nll", "kl"] = option("nll", "retain part: likelihood, or divergence from the model before")


@dataclass(frozen=True)
class SimNPO(Training):
    """`simnpo.py`."""

    beta: float = option(2.5, "inverse temperature of the mean log-probability")
    margin: float = option(0.0, "reward margin (the paper's gamma)")
    forget_weight: float = option(1.0, "weight of the forget part")
    retain_weight: float = option(1.0, "weight of the retain part (lambda)")


@dataclass(frozen=True)
class RMU(Training):
    """`rmu.py`."""

    strength: float = option(4.0, "length of the random vector, in median norms of the residual stream")
    coeff: float | None = option(None, "length of the random vector, absolute, instead of --strength (the paper)")
    retain_weight: float = option(100.0, "weight of the retain part (alpha)")


@dataclass(frozen=True)
class SCRUB(Training):
    """`scrub.py`."""

    forget_weight: float = option(0.1, "weight of the divergence on forget text, which grows (beta)")
    distil_weight: float = option(1.0, "weight of the divergence on retain text (alpha)")
    retain_weight: float = option(1.0, "weight of the likelihood of retain text (gamma)")
    temperature: float = option(2.0, "temperature of both divergences")


@dataclass(frozen=True)
class CRISP(Training):
    """`crisp.py`. It is always trained with LoRA."""

    learning_rate: float = option(5e-4, "learning rate, constant")
    lora_rank: int = option(4, "rank of LoRA adapters")
    more_saes: tuple[str, ...] = option((), "SAEs of further layers, each as L=SAE with L its layer")
    features: int = option(10, "most features suppressed at a layer (k)")
    min_ratio: float = option(3.0, "a feature's mean activation on forget text over that on retain text, at least")
    beta: float = option(0.99, "weight of the retain part; the suppressing part has 1 - beta")
    gamma: float = option(0.01, "weight of the coherence part, relative to beta")


@dataclass(frozen=True)
class TaskVector(Training):
    """`task_vector.py`."""

    keep_utility: float = option(0.0, "as of other methods; the fine-tuning on forget text is not the result")
    scale: float = option(1.0, "how much of the task vector is taken off (lambda)")


@dataclass(frozen=True)
class DARE(TaskVector):
    """`dare.py`."""

    rate: float = option(0.9, "share of the task vector that is dropped (p)")


@dataclass(frozen=True)
class SSD:
    """`ssd.py`."""

    threshold: float = option(100.0, "a weight is dampened if it matters this many times more to forget text (alpha)")
    dampening: float = option(0.1, "how strongly (lambda): smaller is stronger")
    windows: int = option(256, "windows of each kind from which importances are estimated")
    max_tokens: int = option(256, "tokens of a window")


Settings = Training | SSD
