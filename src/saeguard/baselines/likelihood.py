"""Log-probabilities of texts under a model, and divergences between two models, on padded batches.

For the tokens y_1 ... y_T of a row, y_1 is given: log p(y) = sum over t = 2..T of log p(y_t | y_<t).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
"""`input_ids` and `attention_mask` (rows, tokens), padded on the right."""
Pair = Mapping[str, Batch]
"""`forget`, and `retain` where there is retain text, with as many rows."""
Reference = Callable[[], AbstractContextManager[nn.Module]]
"""Gives the model as it was before training, without gradients, for as long as a `with` block lasts."""
Loss = Callable[[nn.Module, Reference, Pair], Tensor]


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Next-token logits (rows, tokens, vocabulary), float32."""
    out: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return out.float()


def predicted(batch: Batch) -> Tensor:
    """Which tokens (rows, tokens - 1) from the second on are predicted: all but padding."""
    return batch["attention_mask"][:, 1:].bool()


def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """log p(y_t | y_<t) (rows, tokens - 1) of the second token on; 0 at padding."""
    scores = logits(model, batch)[:, :-1]
    taken = scores.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return torch.where(predicted(batch), taken - scores.logsumexp(dim=-1), 0.0)


def nll(model: nn.Module, batch: Batch) -> Tensor:
    """Negative log-likelihood a token, the mean over all predicted tokens."""
    return -log_probabilities(model, batch).sum() / predicted(batch).sum()


def divergence(model: nn.Module, reference: Reference, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p_before || p_now) of next-token distributions at temperature T, the mean over all predicted tokens."""
    with reference() as before:
        expected = (logits(before, batch)[:, :-1] / temperature).log_softmax(dim=-1)
    found = (logits(model, batch)[:, :-1] / temperature).log_softmax(dim=-1)
    each = (expected.exp() * (expected - found)).sum(dim=-1)
    counted = predicted(batch)
    return temperature**2 * torch.where(counted, each, 0.0).sum() / counted.sum()
