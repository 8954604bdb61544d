"""`relearn-forget` for methods that are compared: the model trained further on forget text, all weights, no hook on.

The plain model is trained once and shared by all methods that leave it as it is; a checkpoint is trained from where it
is. Settings are those of `attack`. Documents in which an asked question stands are not learned from.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeguard.attacks.config import AttackConfig
from saeguard.attacks.curves import course_of
from saeguard.attacks.relearning import RELEARNING, Lesson
from saeguard.attacks.weights import moved
from saeguard.corpus import Corpus
from saeguard.errors import UsageError
from saeguard.evaluation.sources import TextSet
from saeguard.evaluation.subject import Subject
from saeguard.evaluation.task import Item
from saeguard.sample import FORGET

if TYPE_CHECKING:
    from saeguard.attacks.finetuning import Course

ATTACK = RELEARNING["relearn-forget"]


@dataclass(frozen=True)
class RelearnForget:
    """A lesson, how it is learned and for how many epochs. `about` says all of it, for JSON."""

    config: AttackConfig
    work: Path
    lesson: Lesson
    epochs: int
    about: Mapping[str, Any]

    @classmethod
    def of(cls, config: AttackConfig, epochs: int, forget: str, work: Path, items: Sequence[Item]) -> RelearnForget:
        """On documents of the fit split of `forget`, checkpoints in `work`; `items` are the questions that are asked.

        Raises `UsageError` where something is lacking, `EvaluationError` where no document is left.
        """
        texts = [TextSet(FORGET, "topic", Corpus.of(FORGET, "forget", forget))]
        if lacking := ATTACK.lacks(texts, guarded=False):
            raise UsageError(f"--relearn: {lacking}")
        lesson = Lesson.taken(ATTACK.text, texts, config.documents, without=items)
        how = {name: getattr(config, name) for name in ("learning_rate", "batch", "max_tokens", "seed")}
        return cls(config, work, lesson, epochs, {"epochs": epochs, **how, "lesson": lesson.checked(texts, items)})

    def after(self, subject: Subject) -> Subject:
        """The subject with its model trained, or taken from the checkpoint. Raises a `GuardrailError` by cause."""
        return moved(subject, self._course(subject).after(self.epochs))

    def discard(self, subject: Subject) -> None:
        """Remove the checkpoints, if there are any."""
        if (folder := self._course(subject).folder).exists():
            shutil.rmtree(folder)

    def _course(self, subject: Subject) -> Course:
        return course_of(self.config, self.work, ATTACK, subject, self.lesson)
