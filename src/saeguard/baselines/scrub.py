"""SCRUB (Kurmanji et al. 2023, arXiv 2302.09880): a student that leaves its teacher on forget text.

    L = alpha D(retain) + gamma NLL(retain) - beta D(forget)
    D = T^2 KL(p_before || p_now) at temperature T

The teacher is the model before training. The paper takes turns between epochs that raise D(forget) and epochs that
lower the rest; here every step does both, weighted by beta, which is what arXiv 2504.08192 tunes.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.likelihood import Pair, Reference, divergence, nll
from saeguard.baselines.weight_settings import SCRUB
from saeguard.baselines.weights import Plan, run_plan


def loss(settings: SCRUB, model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
    """L of a batch."""
    left = divergence(model, reference, pair["forget"], temperature=settings.temperature)
    kept = divergence(model, reference, pair["retain"], temperature=settings.temperature)
    retain = settings.distil_weight * kept + settings.retain_weight * nll(model, pair["retain"])
    return retain - settings.forget_weight * left


def run(trial: Trial) -> None:
    """Train and write the checkpoint."""
    run_plan(trial, Plan("scrub", lambda setup: partial(loss, trial.settings), before=True))
