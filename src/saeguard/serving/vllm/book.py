"""What a guarded engine knows of its requests: whose tokens are in a step, and what was decided on each.

No request but those of the start-up proof is admitted before the proof was given.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from saeguard.errors import ProofError
from saeguard.online.intervention import Verdict
from saeguard.serving.vllm.guard import LayerGuard
from saeguard.serving.vllm.proof import check_proof
from saeguard.serving.vllm.slots import Slots

KEPT = 10_000
"""How many finished requests are remembered."""
PROOF = "saeguard-proof"
SUFFIXES = r"(-(?P<prompt>\d+))?(-[0-9a-f]{8})?"
"""What the engine appends to a client's id: the number of the prompt where there are several, and random digits."""


class Book:
    """The guards of an engine and the record of its requests."""

    def __init__(self, guards: Sequence[LayerGuard], *, slots: int) -> None:
        self.guards = tuple(guards)
        self.proven = False
        self._slots = Slots(slots)
        self._finished: OrderedDict[str, list[Verdict]] = OrderedDict()

    def begin(self, requests: Sequence[tuple[str, int, int]], ids: Tensor) -> None:
        """Announce a step: its requests as `Slots.begin` takes them, and the ids (tokens,) of all their tokens."""
        for request, _, _ in requests:
            if not self.proven and not request.startswith(PROOF):
                raise ProofError(
                    "a request came before the start-up proof. Serve with saeguard-vllm or with VLLM_PLUGINS=saeguard, "
                    "or call saeguard.serving.vllm.offline.prove."
                )
        spans = self._slots.begin(requests)
        for guard in self.guards:
            guard.begin(spans, ids)

    def end(self) -> None:
        """After a step. Raises `AttachError` where what was announced did not go through every guard."""
        for guard in self.guards:
            guard.end()

    def finish(self, requests: Iterable[str]) -> None:
        """Requests that are done: their verdicts are kept, their slots are free."""
        for request in requests:
            if (slot := self._slots.find(request)) is not None:
                self._finished[request] = self._of(slot)
        self._slots.finish(requests)
        while len(self._finished) > KEPT:
            self._finished.popitem(last=False)

    def verdicts(self, request: str) -> dict[str, list[Verdict]]:
        """The verdicts of all sequences of a client's request, live or finished, by the engine's ids of them."""
        own = re.compile(rf"(\d+_)?{re.escape(request)}{SUFFIXES}")
        live = {name: self._of(slot) for name in self._slots.live() if (slot := self._slots.find(name)) is not None}
        return {name: these for name, these in {**self._finished, **live}.items() if own.fullmatch(name)}

    def prove(self, rules: Mapping[str, int]) -> None:
        """Take the proof from the requests `proof_id(rule, i)`, i below the number of texts of each rule.

        Raises `ProofError` where it fails.
        """
        for rule, count in rules.items():
            seen = [self._proof_verdict(rule, proof_id(rule, i)) for i in range(count)]
            check_proof(rule, seen)
        self.proven = True

    def _proof_verdict(self, rule: str, request: str) -> Verdict:
        found = [v for these in self.verdicts(request).values() for v in these if v.rule == rule]
        if len(found) != 1:
            raise ProofError(
                f"start-up proof of guardrail {rule}: {request} was read {len(found)} times, expected once"
            )
        return found[0]

    def _of(self, slot: int) -> list[Verdict]:
        return [verdict for guard in self.guards for verdict in guard.verdicts(slot)]


def proof_id(rule: str, index: int) -> str:
    """The id of a request of the start-up proof."""
    return f"{PROOF}-{rule}-{index}"


def place(sequence: str) -> tuple[int, int]:
    """Number of the prompt and of the answer to it, of a sequence by its engine's id; where it stands in the answer."""
    answer = re.match(r"(\d+)_", sequence)
    prompt = re.search(rf"{SUFFIXES}$", sequence)
    return int((prompt and prompt["prompt"]) or 0), int(answer[1]) if answer else 0


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """For JSON; a statistic of which nothing was counted is null."""
    values = dict(vars(verdict))
    return {**values, "statistic": None if values["statistic"] == float("-inf") else values["statistic"],
            "features": list(verdict.features)}  # fmt: skip
