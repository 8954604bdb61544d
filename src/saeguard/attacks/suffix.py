"""Adversarial token search, white box: a few free tokens before or after the question that keep the gate quiet.

Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043) with another aim: not the loss of a target answer, which
the attacker does not know, but the gate statistic less its threshold, of the rule that is furthest over it. Gradients
propose single-token changes, the exact statistic on the text as it would be sent chooses among them. So every gate can
be attacked, and a step needs the blocks up to the guarded layer only. Bounded in steps and in seconds.

A running gate that latches has decided before it reads what follows the question: its gradient there is zero, and the
search ends at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from saeguard.artifact import fingerprint
from saeguard.attacks.attack import ANSWER, Attack, Change, Prompt
from saeguard.attacks.rewriting import remembered
from saeguard.evaluation.mcq import PROMPT, Question
from saeguard.evaluation.subject import Loader
from saeguard.gate import Density, Probe
from saeguard.guardrail import Guardrail
from saeguard.model import input_device, values_of_embeddings
from saeguard.online.live import LiveRule
from saeguard.rule import Rule
from saeguard.tokens import special_token_ids, token_masks
from saeguard.windows import pad_rows, text_ids

Place = Literal["before", "after"]
PLACES: tuple[Place, ...] = ("before", "after")
LENGTH, CANDIDATES, TOP = 8, 24, 64
TOKENS = 2600
"""What a search counts for in the budget of tokens."""


@dataclass(frozen=True)
class Bounds:
    """How long one question may be searched for."""

    steps: int
    seconds: float


def attacks(loader: Loader, guardrail: Guardrail, bounds: Bounds, kept: Path) -> list[Attack]:
    """Before and after the question. What was found is in the folder `kept`."""
    return [
        Attack(
            f"suffix-{place}", "suffix", f"{LENGTH} free tokens {place} the question, searched against the gate",
            remembered(_searched(loader, guardrail, bounds, place), kept / f"suffix-{place}.jsonl",
                       [fingerprint(guardrail.rules), bounds.steps, bounds.seconds]),
            TOKENS,
        )
        for place in PLACES
    ]  # fmt: skip


def _searched(loader: Loader, guardrail: Guardrail, bounds: Bounds, place: Place) -> Change:
    def change(question: Question, draw: Random) -> Prompt:
        model, tokenizer = loader.loaded
        head, tail = _around(question.text, place)
        return _Search(model, tokenizer, guardrail, head, tail).run(draw, bounds)

    return change


def _around(question: str, place: Place) -> tuple[str, str]:
    """The text before and after the free tokens."""
    clean = PROMPT.format(question=question)
    if place == "before":
        return "", f"\n\n{clean}"
    return clean.removesuffix(ANSWER), f"\n{ANSWER}"


class _Search:
    def __init__(self, model: Any, tokenizer: Any, guardrail: Guardrail, head: str, tail: str) -> None:
        self._model, self._tokenizer, self._guardrail = model, tokenizer, guardrail
        self._head, self._tail, self._device = head, tail, input_device(model)
        special = set(special_token_ids(tokenizer))
        ordinary = [i for i in range(len(tokenizer)) if i not in special and tokenizer.decode([i]).strip().isalpha()]
        self._ordinary = torch.tensor(ordinary, device=self._device)
        self._special = torch.tensor(sorted(special), device=self._device)

    def run(self, draw: Random, bounds: Bounds) -> Prompt:
        """The quietest prompt found."""
        begun, calls = time.monotonic(), 0
        free = [int(self._ordinary[draw.randrange(len(self._ordinary))]) for _ in range(LENGTH)]
        best = self._excess([free])[0]
        for _ in range(bounds.steps):
            gradient = self._gradient(free)
            calls += 1
            if not bool(gradient.any()) or time.monotonic() - begun > bounds.seconds:
                break
            proposed = self._proposed(free, gradient, draw)
            found = self._excess(proposed)
            calls += len(proposed)
            least = min(range(len(found)), key=found.__getitem__)
            if found[least] < best:
                free, best = proposed[least], found[least]
        return Prompt(self._text(free), seconds=round(time.monotonic() - begun, 3), calls=calls)

    def _text(self, free: Sequence[int]) -> str:
        return f"{self._head}{self._tokenizer.decode(free).strip()}{self._tail}"

    def _excess(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """For each choice of free tokens, how far the worst rule is over its threshold on the text."""
        tokens, mask = pad_rows([Prompt(self._text(row)).ids(self._tokenizer) for row in rows])
        with self._guardrail.attach(self._model, self._tokenizer) as guard:
            guard.judge(tokens.to(self._device), mask.to(self._device))
            return [max(v.statistic - v.threshold for v in every) for every in guard.all_verdicts]

    def _gradient(self, free: Sequence[int]) -> Tensor:
        """Change of that excess (free, vocabulary), to first order, with the token at each free place."""
        head, tail = (text_ids(self._tokenizer, text) for text in (self._head, self._tail))
        start = Prompt("a").ids(self._tokenizer)[:-1]
        ids = torch.tensor([[*start, *head, *free, *tail]], device=self._device)
        embedding = self._model.get_input_embeddings()
        embedded = embedding(ids).detach().requires_grad_()
        hidden = values_of_embeddings(self._model, self._guardrail.point, embedded)
        excess = torch.stack([self._soft(rule, hidden, ids) for rule in self._guardrail.rules]).amax()
        (gradient,) = torch.autograd.grad(excess, embedded)
        places = slice(len(start) + len(head), len(start) + len(head) + len(free))
        change: Tensor = gradient[0, places].float() @ embedding.weight.detach().float().T
        return change.cpu()

    def _soft(self, rule: Rule, hidden: Tensor, ids: Tensor) -> Tensor:
        """The rule's excess, exact in value; its gradient passes a feature's activity as if it were its activation."""
        live, ids = LiveRule.of(rule, hidden.device), ids.to(hidden.device)
        masks = token_masks(ids, torch.ones_like(ids, dtype=torch.bool), self._special.to(ids.device))
        gate = live.gate
        if isinstance(gate.scorer, Probe):
            scores = gate.scorer.scores(hidden, masks.valid)
        else:
            a = live.encoder(hidden)
            active = a + ((a > 0).float() - a).detach()
            if isinstance(gate.scorer, Density):
                scores = active.amax(dim=-1).double()
            else:
                scores = active.double() @ gate.scorer.weights.double() + gate.scorer.bias
        _, statistics = gate.accumulator.advance(gate.accumulator.start(1), scores, gate.eligible(masks))
        return gate.sequence_statistic(statistics)[0] - rule.threshold

    def _proposed(self, free: Sequence[int], gradient: Tensor, draw: Random) -> list[list[int]]:
        """Single changes: a random place, and one of the tokens there that promise the largest fall."""
        ordinary = self._ordinary.cpu()
        best = ordinary[gradient[:, ordinary].topk(min(TOP, len(ordinary)), largest=False).indices].tolist()
        rows = []
        for _ in range(CANDIDATES):
            place = draw.randrange(len(free))
            rows.append([*free[:place], draw.choice(best[place]), *free[place + 1 :]])
        return rows
