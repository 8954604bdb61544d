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

    def entry(self, subject: str, records: Sequence[Sequence[Record]]) -> dict[str, Any]:
        """For the card: accuracy by role, of the model and under the guardrail."""
        names = ("model", "guarded")[: len(records)]
        return {**self.about, "subject": subject, **{n: accuracy(its) for n, its in zip(names, records, strict=True)}}


@dataclass(frozen=True)
class Relearner:
    """What a curve is made of. `items` are all questions that are asked, none of which may stand in a lesson."""

    config: AttackConfig
    texts: Sequence[TextSet]
    items: Sequence[Item]
    work: Path
    sae_of: SAEOf

    def lesson(self, attack: Relearning) -> tuple[Lesson, dict[str, Any]]:
        """The documents, and what is found to be true of them. Raises `EvaluationError` where they are not as said."""
        lesson = Lesson.taken(attack.text, self.texts, self.config.documents)
        return lesson, lesson.checked(self.texts, self.items)

    def points(self, attack: Relearning, subject: Subject, lesson: Lesson, go_on: Callable[[int], bool]) -> Iterator[Point]:
        """The curve of one subject, as long as `go_on` says so of the next number of epochs."""
        course = self._course(attack, subject, lesson)
        for epochs in sorted(set(self.config.epochs)):
            if not go_on(epochs):
                return
            loader = course.after(epochs)
            model = Subject("unguarded" if subject.guardrail else subject.name, loader)
            about = {"attack": attack.name, "text": attack.text, "lora": attack.lora, "hooked": attack.hooked,
                     "epochs": epochs, "refit": None}  # fmt: skip
            name = f"{attack.name}-epoch-{epochs}"
            says = f"{epochs} epochs, {attack.says}"
            if subject.guardrail is None:
                yield Point(name, says, (model,), "", about)
                continue
            note = refusal(subject.guardrail, loader) or "the guardrail did not refuse"
            yield Point(name, says, (model, forced(subject, subject.guardrail, loader)), note, about)
            for what in self.config.refit:
                again, note = self._refitted(subject.guardrail, loader, what, course.stage(epochs))
                models = (model, Subject.guarded(subject.name, loader, again))
                its = {**about, "refit": what, "drift": again.evidence["refit"]["drift"], "threshold": again.threshold,
                       "features_kept": again.evidence["refit"]["features_kept"]}  # fmt: skip
                yield Point(f"{name}-refit-{what}", f"{says}, then refit: {what}", models, note, its)

    def _course(self, attack: Relearning, subject: Subject, lesson: Lesson) -> Course:
        from saeguard.attacks.finetuning import Course
        from saeguard.baselines.weight_settings import Training

        config = self.config
        settings = Training(
            config.lora_learning_rate if attack.lora else config.learning_rate, batch=config.batch,
            max_tokens=config.max_tokens, lora_rank=config.lora_rank if attack.lora else 0, keep_utility=0.0,
        )  # fmt: skip
        windows = lesson.windows(subject.loader.loaded[1], config.max_tokens)
        under = fingerprint(subject.guardrail.rules) if attack.hooked and subject.guardrail else ""
        return Course(
            subject.loader, windows, settings, self.work, subject.attach if attack.hooked else None, under, config.seed
        )

    def _refitted(self, guardrail: Guardrail, loader: Loader, what: Refit, folder: Path) -> tuple[Guardrail, str]:
        """The guardrail fitted anew on the trained model with the texts it was fitted on, and what had to be forced."""
        kept = folder / f"{fingerprint(guardrail.rules)[:16]}-{what}"
        if kept.is_dir():
            return Guardrail.from_pretrained(kept), ""
        texts = fitted_texts(guardrail, self.texts)
        subject = Read(*loader.loaded, self.sae_of(guardrail), guardrail.layer)
        only = None if what == "whole" else what

        def run(*, force: bool) -> Guardrail:
            return refit(
                guardrail, subject, forget=texts.get(FORGET), retain={n: t for n, t in texts.items() if n != FORGET},
                config=RefitConfig(only, force), work_dir=folder / "shards", show_progress=True,
            )  # fmt: skip

        try:
            found, note = run(force=False), ""
        except SAEMismatchError as error:
            found, note = run(force=True), f"refit had to be forced: {error}"
        found.save_pretrained(kept)
        return found, note


def fitted_texts(guardrail: Guardrail, texts: Sequence[TextSet]) -> dict[str, list[str]]:
    """The texts that a guardrail was fitted on, by its names for them. Raises `UsageError` where one is not given."""
    given = {each.corpus.summary().fingerprint: each.corpus for each in texts}
    known = guardrail.evidence.get("corpora", {})
    if missing := [name for name, its in known.items() if its["fingerprint"] not in given]:
        raise UsageError(
            f"--refit needs the texts that the guardrail was fitted on, and has not: {', '.join(missing)}. Give them "
            "with --topic-text, --near-text and --far-text NAME=FILE."
        )
    return {name: list(given[its["fingerprint"]].read()) for name, its in known.items()}


def accuracy(records: Sequence[Record]) -> dict[str, Any]:
    """Share of right answers by role, and how many triggered, where a guardrail looked."""
    found = {}
    for role in ROLES:
        its = [record for record in records if record.role == role]
        if its:
            seen = [record.triggered for record in its if record.triggered is not None]
            found[role] = {
                "right": Rate(sum(bool(record.scores["accuracy"]) for record in its), len(its)).as_dict(),
                "triggered": Rate(sum(seen), len(seen)).as_dict() if seen else None,
            }
    return found
