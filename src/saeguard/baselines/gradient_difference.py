"""Gradient difference (Liu, Liu and Stone 2022, arXiv 2203.12817): ascent on forget text, descent on retain text.

    L = - gamma NLL(forget) + beta NLL(retain)
"""

from __future__ import annotations

from torch import Tensor, nn

from saeguard.baselines.config import GradientDifference
from saeguard.baselines.likelihood import Pair, Reference, nll


def loss(settings: GradientDifference, model: nn.Module, reference: Reference, pair: Pair) -> Tensor:
    """L of a batch."""
    forget, retain = nll(model, pair["forget"]), nll(model, pair["retain"])
    return settings.retain_weight * retain - settings.forget_weight * forget
