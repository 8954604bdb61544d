"""Task-vector negation with DARE (Yu et al. 2024, arXiv 2311.03099): most of the task vector is dropped first.

m ~ Bernoulli(p)        delta' = (1 - m) * (theta_tuned - theta) / (1 - p)        theta' = theta - lambda delta'
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.task_vector import loss
from saeguard.baselines.weight_settings import DARE
from saeguard.baselines.weights import Plan, Weights, run_plan


def combine(settings: DARE, seed: int, before: Weights, tuned: Weights) -> dict[str, Tensor]:
    """theta' by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: weight - settings.scale * drop_and_rescale(tuned[name] - weight, settings.rate, generator)
        for name, weight in sorted(before.items())
    }


def drop_and_rescale(delta: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """delta' of one weight: entries are 0 with probability `rate`, the others grow so that the mean stays."""
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) >= rate
    return torch.where(kept, delta / (1 - rate), 0.0)


def run(trial: Trial) -> None:
    """Fine-tune (as task-vector negation does) and write the checkpoint."""
    combined = partial(combine, trial.settings, trial.seed)
    run_plan(trial, Plan("fine-tuning", lambda setup: loss, combine=combined, unused=("scale", "rate")))
