"""Gradient difference (Liu, Liu and Stone 2022, arXiv 2203.12817): ascent on forget text, descent on retain text.

L = - gamma NLL(forget) + beta NLL(retain)
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.likelihood import Pair, Reference, nll
from saeguard.baselines.weight_settings import GradientDifference
from saeguard.baselines.weights import Plan, run_plan


def loss(settings: GradientDifference, model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
    """L of a batch."""
    forget, retain = nll(model, pair["forget"]), nll(model, pair["retain"])
    return settings.retain_weight * retain - settings.forget_weight * forget


def run(trial: Trial) -> None:
    """Train and write the checkpoint."""
    run_plan(trial, Plan("grad-diff", lambda setup: partial(loss, trial.settings)))
