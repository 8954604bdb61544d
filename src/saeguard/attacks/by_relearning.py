"""Relearning, as jobs of a campaign: every subject's curve (curves.py) over all questions on the topic, where what is
right after training is compared with what was before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from saeguard.attacks.attack import CLEAN
from saeguard.attacks.campaign import Campaign, Job, Row
from saeguard.attacks.curves import Point, Relearner, accuracy
from saeguard.attacks.relearning import FAMILY, RELEARNING
from saeguard.attacks.success import Pair
from saeguard.attacks.task import Attacked, attacked
from saeguard.evaluation.subject import Subject
from saeguard.evaluation.task import Item, Record, limited


def jobs(names: Sequence[str], relearner: Relearner) -> list[Job]:
    """One for each name (relearning.RELEARNING)."""
    return [Job(name, FAMILY, partial(_relearn, name, relearner)) for name in names]


def _relearn(name: str, relearner: Relearner, campaign: Campaign) -> None:
    attack = RELEARNING[name]
    chosen = [*campaign.clean.topic, *limited(campaign.clean.off_topic, campaign.config.others)]
    subjects = [s for s in campaign.subjects[1:] if s.guardrail or (s.attach is None and not attack.hooked)]
    if not subjects:
        why = "it needs a guardrail or a checkpoint: --guardrail DIR, --checkpoint NAME=M"
        campaign.leave_out(name, FAMILY, why)
        return
    lesson, campaign.lessons[name] = relearner.lesson(attack, chosen)
    campaign.say(relearner.needs(attack, subjects, lesson))
    task = Attacked(FAMILY, tuple(attacked(CLEAN, chosen, campaign.config.seed)))  # type: ignore[arg-type]
    for subject in subjects:
        before = [_clean_records(campaign, one, task.attacked) for one in (campaign.unguarded, subject)]
        start: Row = {"attack": name, "subject": subject.name, "epochs": 0, "refit": None}
        campaign.curves.append({**start, **_accuracies(subject, before)})
        for epochs in relearner.epochs:
            if not campaign.late(f"{name}-epoch-{epochs}", FAMILY):
                _ask(campaign, task, subject, relearner.points(attack, subject, lesson, epochs))


def _ask(campaign: Campaign, task: Attacked, subject: Subject, points: Iterable[Point]) -> None:
    for point in points:
        run = campaign.ask(task, point.models, kept_as=f"{point.name} of {subject.name}")
        records = [run.records[model.name] for model in point.models]
        campaign.curves.append({"subject": subject.name, **point.about, **_accuracies(subject, records)})
        control = records[0] if subject.guardrail else campaign.records["clean"][campaign.unguarded.name]
        pair = Pair.of(control, records[-1])
        campaign.add(point.name, FAMILY, point.says, [(subject.name, pair)], point.note)


def _clean_records(campaign: Campaign, subject: Subject, items: Sequence[Item]) -> list[Record]:
    ids = {item.id for item in items}
    return [record for record in campaign.records["clean"][subject.name] if record.item in ids]


def _accuracies(subject: Subject, records: Sequence[Sequence[Record]]) -> Row:
    """Of the model, and under its guardrail where there is one: those are the last records, and the first the model's
    own."""
    guarded = subject.guardrail is not None
    return {"model": accuracy(records[0 if guarded else -1]), "guarded": accuracy(records[-1]) if guarded else None}
