"""Relearning as a curve: the questions asked after more and more epochs, with the hook, without it, and after `refit`.

A guardrail refuses a model that was trained further. What it says is noted, and the figures are with that check
overridden; after `refit` there is nothing to override. A checkpoint of another method is trained from where it is, and
compared with the unguarded model before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeguard.artifact import fingerprint
from saeguard.attacks.config import AttackConfig, Refit
from saeguard.attacks.relearning import Lesson, Relearning
from saeguard.attacks.weights import forced, refusal
from saeguard.calibration import Rate
from saeguard.config import RefitConfig
from saeguard.doctor.reading import Subject as Read
from saeguard.errors import SAEMismatchError, UsageError
from saeguard.evaluation.sources import TextSet
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.task import ROLES, Item, Record
from saeguard.guardrail import Guardrail
from saeguard.refit import refit
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.sample import FORGET

if TYPE_CHECKING:
    from saeguard.attacks.finetuning import Course

SAEOf = Callable[[Guardrail], SparseAutoencoder]
MODEL = "model"


@dataclass(frozen=True)
class Point:
    """One point of a curve: what is asked then. `models` are the trained model, and under its guardrail if it has one.

    `about` says how it was reached, for JSON.
    """

    name: str
    says: str
    models: tuple[Subject, ...]
    note: str
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Relearner:
    """What curves are made of: settings, texts, where checkpoints are kept, and a guardrail's SAE (for `refit`)."""

    config: AttackConfig
    texts: Sequence[TextSet]
    work: Path
    sae_of: SAEOf

    @property
    def epochs(self) -> list[int]:
        """After how many epochs the questions are asked. Raises `UsageError`."""
        if not self.config.epochs or min(self.config.epochs) < 1:
            raise UsageError("--epochs: expected numbers from 1 on")
        return sorted(set(self.config.epochs))

    def lesson(self, attack: Relearning, items: Sequence[Item]) -> tuple[Lesson, dict[str, Any]]:
        """The documents, and what is found to be true of them, `items` being the questions that are asked.

        Raises `EvaluationError` where they are not as said.
        """
        lesson = Lesson.taken(attack.text, self.texts, self.config.documents)
        return lesson, lesson.checked(self.texts, items)

    def needs(self, attack: Relearning, subjects: Sequence[Subject], lesson: Lesson) -> str:
        """What training takes, for people, before it begins.

        Raises `UsageError` where `refit` will lack texts, `SAEError` where it will lack the SAE.
        """
        for guardrail in (subject.guardrail for subject in subjects if self.config.refit):
            if guardrail is not None:
                fitted_texts(guardrail, self.texts)
                self.sae_of(guardrail)
        course = course_of(self.config, self.work, attack, subjects[0], lesson)
        names, steps = ", ".join(subject.name for subject in subjects), course.steps(self.epochs[-1])
        return (
            f"{attack.name}: {len(lesson.texts)} documents as {len(course.windows)} windows, {course.tokens:,} tokens "
            f"an epoch; for each of {names} {steps:,} steps, {course.memory} of memory, and "
            f"{course.disk(len(self.epochs))} in {self.work}"
        )

    def points(self, attack: Relearning, subject: Subject, lesson: Lesson, epochs: int) -> Iterator[Point]:
        """What is asked of a subject after so many epochs: as it is then, and after each `refit` that is wanted."""
        course = course_of(self.config, self.work, attack, subject, lesson)
        loader = course.after(epochs)
        model = Subject(MODEL, loader)
        about = {
            "attack": attack.name, "text": attack.text, "lora": attack.lora, "hooked": attack.hooked, "epochs": epochs,
            "refit": None, "cost": {"steps": course.steps(epochs), "tokens": epochs * course.tokens},
        }  # fmt: skip
        name, says = f"{attack.name}-epoch-{epochs}", f"{attack.says}, {epochs} epochs"
        if subject.guardrail is None:
            yield Point(name, says, (model,), "", about)
            return
        note = refusal(subject.guardrail, loader) or "the guardrail did not refuse"
        yield Point(name, says, (model, forced(subject, subject.guardrail, loader)), note, about)
        for what in self.config.refit:
            again, note = self._refitted(subject.guardrail, loader, what, course.stage(epochs))
            found = again.evidence["refit"]
            its = {"refit": what, "drift": found["drift"], "threshold": again.threshold,
                   "features_kept": found["features_kept"]}  # fmt: skip
            models = (model, Subject.guarded(subject.name, loader, again))
            yield Point(f"{name}-refit-{what}", f"{says}, then refit: {what}", models, note, {**about, **its})

    def _refitted(self, guardrail: Guardrail, loader: Loader, what: Refit, folder: Path) -> tuple[Guardrail, str]:
        """The guardrail fitted anew on the trained model with the texts it was fitted on, and what had to be forced."""
        texts = fitted_texts(guardrail, self.texts)
        forget, retain = texts.get(FORGET), {name: its for name, its in texts.items() if name != FORGET}
        subject = Read(*loader.loaded, self.sae_of(guardrail), guardrail.layer)
        only = None if what == "whole" else what

        def run(*, force: bool) -> Guardrail:
            return refit(
                guardrail, subject, forget=forget, retain=retain, config=RefitConfig(only, force),
                work_dir=folder / "shards", show_progress=True,
            )  # fmt: skip

        try:
            return run(force=False), ""
        except SAEMismatchError as error:
            return run(force=True), f"refit had to be forced: {error}"


def course_of(config: AttackConfig, work: Path, attack: Relearning, subject: Subject, lesson: Lesson) -> Course:
    """How a subject's model is trained in an attack."""
    from saeguard.attacks.finetuning import Course
    from saeguard.baselines.weight_settings import Training

    settings = Training(
        config.lora_learning_rate if attack.lora else config.learning_rate, batch=config.batch,
        max_tokens=config.max_tokens, lora_rank=config.lora_rank if attack.lora else 0, keep_utility=0.0,
    )  # fmt: skip
    windows = lesson.windows(subject.loader.loaded[1], config.max_tokens)
    under = fingerprint(subject.guardrail.rules) if attack.hooked and subject.guardrail else ""
    return Course(
        subject.loader, windows, settings, work, subject.attach if attack.hooked else None, under, config.seed
    )


def fitted_texts(guardrail: Guardrail, texts: Sequence[TextSet]) -> dict[str, list[str]]:
    """The texts that a guardrail was fitted on, by its names for them. Raises `UsageError` where one is not given."""
    given = {each.corpus.summary().fingerprint: each.corpus for each in texts}
    known = guardrail.evidence.get("corpora", {})
    if not known:
        raise UsageError(
            f"--refit: the guardrail of {guardrail.rules[0].name!r} does not say which texts it was fitted on"
        )
    if missing := [name for name, its in known.items() if its["fingerprint"] not in given]:
        raise UsageError(
            f"--refit needs the texts that the guardrail was fitted on, and has not: {', '.join(missing)}. Give them "
            "with --topic-text, --near-text and --far-text NAME=FILE."
        )
    return {name: list(given[its["fingerprint"]].read()) for name, its in known.items()}


def accuracy(records: Sequence[Record]) -> dict[str, Any]:
    """Share of right answers by role, and how many triggered, where a guardrail looked."""
    found: dict[str, Any] = {}
    for role in ROLES:
        its = [record for record in records if record.role == role]
        if its:
            seen = [record.triggered for record in its if record.triggered is not None]
            found[role] = {
                "right": Rate(sum(bool(record.scores["accuracy"]) for record in its), len(its)).as_dict(),
                "triggered": Rate(sum(seen), len(seen)).as_dict() if seen else None,
            }
    return found
