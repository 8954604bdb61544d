"""How the next token is drawn: greedy, or from the softmax with temperature, nucleus and penalties.

A row draws from a generator of its own, one number a token, so what it draws does not depend on its neighbours in the
batch (their presence changes the last bits of its logits, no more).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """What a request asks for. `temperature` 0 is greedy; `logprobs` is the number of alternatives shown, or None."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the largest logit is taken as it is."""
        return self.temperature == 0 and self.presence_penalty == 0 and self.frequency_penalty == 0

    def generator(self) -> torch.Generator:
        """A generator with the seed asked for, else a fresh one."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


@dataclass(frozen=True)
class Token:
    """A drawn token with its log-probability under the model, and the likeliest ones, where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator, counts: Mapping[int, int]) -> int:
    """The next token from logits (vocabulary,); `counts` says how often each token was drawn before."""
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        ids = torch.tensor(list(counts), device=logits.device)
        often = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
        logits = logits.index_add(0, ids, -(sampling.presence_penalty + sampling.frequency_penalty * often))
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=0)
    if sampling.top_p < 1:
        probabilities = nucleus(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(dim=0)
    point = torch.rand(1, generator=generator, dtype=torch.float64).to(cumulative.device) * cumulative[-1]
    return min(int(torch.searchsorted(cumulative, point, right=True)), len(logits) - 1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The likeliest tokens that together reach `top_p`, at least one; the others at 0."""
    ordered, order = probabilities.sort(descending=True)
    kept = ordered.cumsum(dim=0) - ordered < top_p
    kept[0] = True
    return torch.zeros_like(probabilities).index_put((order[kept],), ordered[kept])


def with_logprobs(token: int, logits: Tensor, alternatives: int) -> Token:
    """The token with log-probabilities of the model's own distribution, before temperature and penalties."""
    logprobs = torch.log_softmax(logits.float(), dim=0)
    best = logprobs.topk(alternatives) if alternatives else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(token, float(logprobs[token]), top)
