"""Task-vector negation (Ilharco et al. 2023, arXiv 2212.04089): fine-tune on forget text, then go the other way.

theta_tuned = argmin NLL(forget), from theta        theta' = theta - lambda (theta_tuned - theta)
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.likelihood import Pair, Reference, nll
from saeguard.baselines.weight_settings import TaskVector
from saeguard.baselines.weights import Plan, Weights, run_plan


def loss(model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
    """NLL(forget) of a batch."""
    return nll(model, pair["forget"])


def combine(settings: TaskVector, before: Weights, tuned: Weights) -> dict[str, Tensor]:
    """theta' by name."""
    return {name: weight - settings.scale * (tuned[name] - weight) for name, weight in before.items()}


def run(trial: Trial) -> None:
    """Fine-tune and write the checkpoint."""
    run_plan(
        trial, Plan("fine-tuning", lambda setup: loss, combine=partial(combine, trial.settings), unused=("scale",))
    )
