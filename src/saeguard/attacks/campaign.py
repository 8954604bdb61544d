"""A campaign: the clean questions, then one attack after the other on what the guardrail blocks.

First the unguarded model is asked every question on the topic with and without the question: what it gets right from
the options alone is not attacked. Every attack gets the questions that a subject blocks in the clean form, and some off
the topic, the same for the unguarded model and for every subject. Finished batches are kept by the harness, so a
campaign that was stopped or killed goes on where it was. No attack is begun after the time is up; those left out are
listed with the reason.

What the attacks are stands in by_prompt.py, white_box.py and by_relearning.py: each makes them into jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from saeguard.attacks.attack import CLEAN, NO_QUESTION
from saeguard.attacks.config import AttackConfig
from saeguard.attacks.success import Blocked, Pair, Records, outcome
from saeguard.attacks.task import GROUPS, Attacked, AttackedItem, attacked
from saeguard.errors import EvaluationError
from saeguard.evaluation.harness import Settings, TaskRun, evaluate
from saeguard.evaluation.sources import QuestionSet
from saeguard.evaluation.subject import Subject
from saeguard.evaluation.task import Item, Record, Task, limited
from saeguard.evaluation.tasks.multiple_choice import QuestionItem, question_items

Row = dict[str, Any]
CLEAN_TOKENS = 40
"""About how many tokens a question and its options have, for the budget."""


@dataclass(frozen=True)
class Job:
    """One attack, or several points of one, on all subjects of a campaign."""

    name: str
    family: str
    make: Callable[[Campaign], None]


@dataclass(frozen=True)
class Clean:
    """The questions in the clean form by id; by subject its records with the unguarded model's, and what it blocks."""

    items: Mapping[str, AttackedItem]
    pairs: Mapping[str, Pair]
    blocked: Mapping[str, Blocked]

    @property
    def topic(self) -> list[AttackedItem]:
        """All on the topic."""
        return [item for item in self.items.values() if item.role == "topic"]

    @property
    def off_topic(self) -> list[AttackedItem]:
        """All others."""
        return [item for item in self.items.values() if item.role != "topic"]

    @property
    def to_attack(self) -> list[AttackedItem]:
        """Those on the topic that a subject blocks."""
        found = {item for its in self.blocked.values() for item in its.blocked}
        return [item for item in self.topic if item.id in found]


@dataclass
class Campaign:
    """The unguarded model first, then what is attacked; what was found grows as it goes, as a card holds it."""

    subjects: Sequence[Subject]
    sets: Sequence[QuestionSet]
    config: AttackConfig
    work: Path
    say: Callable[[str], None] = lambda text: None
    rows: list[Row] = field(default_factory=list)
    curves: list[Row] = field(default_factory=list)
    lessons: dict[str, Row] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)
    records: dict[str, dict[str, list[Record]]] = field(default_factory=dict)
    clean: Clean = field(init=False)

    def run(self, jobs: Sequence[Job]) -> None:
        """The clean questions, then the attacks in the order given.

        Raises `EvaluationError` where nothing is blocked: there is nothing to attack.
        """
        self._until = time.monotonic() + 60 * self.config.minutes
        self.clean = self._asked_clean()
        if not self.clean.to_attack:
            raise EvaluationError(
                "no question on the topic is answered right without the guardrail (and wrong from the options alone) "
                "and wrong with it: there is nothing to attack. Give more questions (--limit), or another guardrail."
            )
        for number, job in enumerate(jobs, 1):
            if not self.late(job.name, job.family):
                self.say(f"{number} of {len(jobs)}: {job.name}")
                job.make(self)

    @property
    def unguarded(self) -> Subject:
        """The model as it is."""
        return self.subjects[0]

    @property
    def guarded(self) -> list[Subject]:
        """Those that have a guardrail."""
        return [subject for subject in self.subjects if subject.guardrail is not None]

    def late(self, name: str, family: str) -> bool:
        """Whether the time is up, and an attack therefore left out."""
        late = time.monotonic() > self._until
        if late:
            self.leave_out(name, family, f"the {self.config.minutes:g} minutes were up: run again to go on")
        return late

    def leave_out(self, name: str, family: str, why: str) -> None:
        """Note an attack that is not made."""
        self.left_out.append({"attack": name, "family": family, "why": why})

    def chosen(self, tokens: int = 0, shared: int = 0) -> list[QuestionItem]:
        """The items that an attack which adds so many tokens is tried on, within the budget: `shared` ones are read
        once a group, whatever triggers."""
        alone = self.config.budget // (tokens + CLEAN_TOKENS)
        most = max(1, alone, (self.config.budget - GROUPS * shared) // (tokens - shared + CLEAN_TOKENS))
        off_topic = self.clean.off_topic
        domains = len({item.domain for item in off_topic}) or 1
        each = min(self.config.others, max(1, most // domains))
        return [*_first(self.clean.to_attack, most), *limited(off_topic, each)]  # type: ignore[list-item]

    def ask(self, task: Task, subjects: Sequence[Subject], kept_as: str | None = None) -> TaskRun:
        """A task done by some models, its records kept under its name or another. Its items are chosen before."""
        return self._asked(task, subjects, Settings("all"), kept_as)

    def add(self, name: str, family: str, says: str, pairs: Iterable[tuple[str, Pair]], note: str = "") -> None:
        """Note what an attack achieved on subjects by name."""
        for subject, pair in pairs:
            found = outcome(self.clean.blocked[subject].blocked, self.clean.pairs[subject], pair)
            about = {"attack": name, "family": family, "says": says, "subject": subject, "note": note}
            self.rows.append({**about, **found, "ratio": self._ratio(subject, found["statistic"])})

    def _asked_clean(self) -> Clean:
        task = Attacked("clean", tuple(attacked(CLEAN, question_items(self.sets), self.config.seed)))
        run = self._asked(task, self.subjects, Settings(self.config.split, self.config.limit))
        items = {item.id: item for item in run.items if isinstance(item, AttackedItem)}
        pairs = dict(pairs_of(run))
        without = self._without_question([item for item in items.values() if item.role == "topic"])
        return Clean(items, pairs, {name: Blocked.of(pair, without) for name, pair in pairs.items()})

    def _without_question(self, topic: Sequence[QuestionItem]) -> Records:
        """What the unguarded model answers from the options alone."""
        if not topic:
            return {}
        items = tuple(attacked(NO_QUESTION, topic, self.config.seed))
        run = self.ask(Attacked(NO_QUESTION.name, items), [self.unguarded])
        return {record.item: record for record in run.records[self.unguarded.name]}

    def _asked(self, task: Task, subjects: Sequence[Subject], of: Settings, kept_as: str | None = None) -> TaskRun:
        settings = replace(of, keep_text=self.config.keep_text, seed=self.config.seed)
        (run,) = evaluate(subjects, [task], settings, work=self.work, show_progress=True)
        self.records[kept_as or task.name] = run.records
        return run

    def _ratio(self, name: str, statistic: float | None) -> float | None:
        """A statistic over its threshold; None where there are several rules, whose statistics do not compare."""
        guardrail = next(subject.guardrail for subject in self.subjects if subject.name == name)
        if guardrail is None or statistic is None or len(guardrail.rules) > 1 or not guardrail.threshold:
            return None
        return statistic / guardrail.threshold


def pairs_of(run: TaskRun) -> Iterator[tuple[str, Pair]]:
    """Every subject's records with those of the unguarded model, which come first."""
    unguarded, *others = run.records.items()
    return ((name, Pair.of(unguarded[1], records)) for name, records in others)


def _first(items: Sequence[QuestionItem], count: int) -> list[Item]:
    """At most `count` of all items together, chosen as the harness chooses."""
    together = [replace(item, domain="") for item in items]
    ids = {item.id for item in limited(together, count)}
    return [item for item in items if item.id in ids]
