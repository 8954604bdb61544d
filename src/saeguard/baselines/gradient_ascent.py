"""Gradient ascent (Jang et al. 2023, arXiv 2210.01504): the likelihood of forget text is minimised.

    L = - NLL(forget)

It has no bound below and destroys the model if it is not stopped; the stopping rule is in `utility.py`.
"""

from __future__ import annotations

from torch import Tensor, nn

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.likelihood import Pair, Reference, nll
from saeguard.baselines.weights import Plan, run_plan


def loss(model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
    """L of a batch."""
    return -nll(model, pair["forget"])


def run(trial: Trial) -> None:
    """Train and write the checkpoint."""
    run_plan(trial, Plan("grad-ascent", lambda setup: loss))
