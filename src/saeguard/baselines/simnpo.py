"""SimNPO (Fan et al. 2024, arXiv 2410.07163): NPO without a reference model, length-normalised.

    L = - w_f (2 / beta) E_forget[ log sigmoid( - (beta / |y|) log p(y) - margin ) ] + w_r NLL(retain)

|y| is the number of predicted tokens of the window y.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.likelihood import Pair, Reference, log_probabilities, nll, predicted
from saeguard.baselines.weight_settings import SimNPO
from saeguard.baselines.weights import Plan, run_plan


def loss(settings: SimNPO, model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
    """L of a batch."""
    mean = log_probabilities(model, pair["forget"]).sum(dim=1) / predicted(pair["forget"]).sum(dim=1)
    forget = -2 / settings.beta * logsigmoid(-settings.beta * mean - settings.margin).mean()
    return settings.forget_weight * forget + settings.retain_weight * nll(model, pair["retain"])


def run(trial: Trial) -> None:
    """Train and write the checkpoint."""
    run_plan(trial, Plan("simnpo", lambda setup: partial(loss, trial.settings)))
