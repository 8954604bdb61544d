"""The residual stream changed in front of the guard, white box, with a vector found for each question on its own.

    error-found   the vector makes the right option the likeliest. Whoever searches knows the answer, so this is the
                  most that can pass in what the SAE's reconstruction leaves out (arXiv 2606.18322)
    error-forced  the same for a wrong option, drawn at random. What succeeds here puts an answer in and brings none
                  back; of what `error-found` brings back, so much may have been put in

Both vectors are at right angles to all that the guard reads (steering.py).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from saeguard.artifact import fingerprint
from saeguard.attacks.steering import in_front, search
from saeguard.attacks.task import Attacked, AttackedItem
from saeguard.evaluation.subject import Opened, Subject
from saeguard.evaluation.task import Record
from saeguard.guardrail import Guardrail

SAYS = {
    "error-found": "for each question a vector in front of the guard, at right angles to what it reads, found with the "
    "right answer at hand",
    "error-forced": "the same for a wrong option: success is that this one is chosen, known or not",
}


@dataclass(frozen=True)
class SteeredEach(Attacked):
    """Questions of which the subject with a guardrail gets each under a vector of its own; the others, as they are.

    `steps` and `seconds` bound the search for one.
    """

    subject: Subject
    guardrail: Guardrail
    steps: int
    seconds: float

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the vectors depend on beside the question."""
        return {"guardrail": fingerprint(self.guardrail.rules), "steps": self.steps, "seconds": self.seconds}

    def run(self, it: Opened, batch: Sequence[AttackedItem], seed: int) -> list[Record]:
        """Search for each question of a batch, and ask it."""
        if it.guard is None:
            return super().run(it, batch, seed)
        with it.paused():
            return [self._asked(item, seed) for item in batch]

    def _asked(self, item: AttackedItem, seed: int) -> Record:
        begun, wanted = time.monotonic(), self._wanted(item, seed)
        vector, calls = search(self.subject, self.guardrail, [wanted], self.steps, seconds=self.seconds)
        seconds = time.monotonic() - begun
        attach = in_front(self.subject, self.guardrail, lambda values: values + vector.to(values))
        with ExitStack() as stack:
            (record,) = super().run(Opened(self.subject.loader.loaded, attach, stack), [wanted], seed)
        return replace(record, scores={**record.scores, "search_seconds": seconds, "calls": float(calls)})

    def _wanted(self, item: AttackedItem, seed: int) -> AttackedItem:
        """The question with the option that is sought in the right one's place."""
        if self.name != "error-forced":
            return item
        others = [i for i in range(len(item.question.choices)) if i != item.question.answer]
        answer = Random(f"{seed} {item.id}").choice(others)
        return replace(item, question=replace(item.question, answer=answer))
