"""Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868) with a retain part.

    L = - gamma (2 / beta) E_forget[ log sigmoid( - beta log( p_now(y) / p_before(y) ) ) ] + alpha R
    R = NLL(retain), or KL(p_before || p_now) on retain text

y is a whole window. For beta towards 0 the gradient is that of gradient ascent.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.likelihood import Pair, Reference, divergence, log_probabilities, nll
from saeguard.baselines.weight_settings import NPO
from saeguard.baselines.weights import Plan, run_plan


def loss(settings: NPO, model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
    """L of a batch."""
    with reference() as before:
        log_before = log_probabilities(before, pair["forget"]).sum(dim=1)
    log_now = log_probabilities(model, pair["forget"]).sum(dim=1)
    forget = -2 / settings.beta * logsigmoid(-settings.beta * (log_now - log_before)).mean()
    if settings.retain_loss == "kl":
        retain = divergence(model, reference, pair["retain"])
    else:
        retain = nll(model, pair["retain"])
    return settings.forget_weight * forget + settings.retain_weight * retain


def run(trial: Trial) -> None:
    """Train and write the checkpoint."""
    run_plan(trial, Plan("npo", lambda setup: partial(loss, trial.settings), before=True))
