"""A campaign: the clean questions, then one attack after the other on what the guardrail blocks.

First the unguarded model is asked every question on the topic with and without the question: what it gets right from
the options alone is not attacked. Every attack gets the questions that a subject blocks in the clean form, and some off
the topic, the same for the unguarded model and for every subject. Finished batches are kept by the harness, so a
campaign that was stopped or killed goes on where it was. No attack is begun after the time is up; those left out are
listed with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from saeguard.attacks import steering, weights
from saeguard.attacks.attack import CLEAN, NO_QUESTION, Attack
from saeguard.attacks.catalogue import FAMILY_OF
from saeguard.attacks.config import AttackConfig
from saeguard.attacks.curves import Point, Relearner, accuracy
from saeguard.attacks.reading import AnswerProbe, Lens, at_layer, layers_behind
from saeguard.attacks.relearning import FAMILY, RELEARNING
from saeguard.attacks.success import Blocked, Pair, Records, outcome
from saeguard.attacks.task import GROUPS, Attacked, AttackedItem, attacked
from saeguard.errors import EvaluationError
from saeguard.evaluation.harness import Settings, TaskRun, evaluate
from saeguard.evaluation.sources import QuestionSet
from saeguard.evaluation.subject import Subject
from saeguard.evaluation.task import Dev, Item, Record, Task, limited, split
from saeguard.evaluation.tasks.multiple_choice import QuestionItem, question_items
from saeguard.model import decoder_layers, text_config

Row = dict[str, Any]
CLEAN_TOKENS = 40
"""About how many tokens a question and its options have, for the budget."""


@dataclass
class Campaign:
    """The unguarded model first, then what is attacked; `rows`, `curves` and `left_out` grow as it goes.

    `relearner` is for the attacks that train.
    """

    subjects: Sequence[Subject]
    sets: Sequence[QuestionSet]
    config: AttackConfig
    work: Path
    say: Callable[[str], None] = lambda text: None
    relearner: Relearner | None = None
    rows: list[Row] = field(default_factory=list)
    curves: list[Row] = field(default_factory=list)
    lessons: dict[str, Row] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)
    records: dict[str, dict[str, list[Record]]] = field(default_factory=dict)
    blocked: dict[str, Blocked] = field(default_factory=dict)

    def run(self, attacks: Sequence[Attack], others: Sequence[str]) -> None:
        """The clean questions, attacks on prompts, then those of `others` (catalogue.FAMILY_OF) in the order given.

        Raises `EvaluationError` where nothing is blocked: there is nothing to attack.
        """
        self._until = time.monotonic() + 60 * self.config.minutes
        self._clean()
        if not self._topic:
            raise EvaluationError(
                "no question on the topic is answered right without the guardrail (and wrong from the options alone) "
                "and wrong with it: there is nothing to attack. Give more questions (--limit), or another guardrail."
            )
        jobs: list[tuple[str, str, Callable[[], None]]] = [
            (attack.name, attack.family, partial(self._attack, attack)) for attack in attacks
        ]
        jobs += [
            (name, FAMILY_OF[name], partial(self._relearn if name in RELEARNING else self._white_box, name))
            for name in others
        ]
        for number, (name, family, job) in enumerate(jobs, 1):
            if not self._late(name, family):
                self.say(f"{number} of {len(jobs)}: {name}")
                job()

    def _late(self, name: str, family: str) -> bool:
        """Whether the time is up, and an attack therefore left out."""
        late = time.monotonic() > self._until
        if late:
            self.leave_out(name, family, f"the {self.config.minutes:g} minutes were up: run again to go on")
        return late

    def leave_out(self, name: str, family: str, why: str) -> None:
        """Note an attack that is not made."""
        self.left_out.append({"attack": name, "family": family, "why": why})

    def _clean(self) -> None:
        items = attacked(CLEAN, question_items(self.sets), self.config.seed)
        (run,) = self._evaluate(Attacked("clean", tuple(items)), self.subjects, split_=self.config.split)
        self._questions = {item.id: item for item in run.items if isinstance(item, AttackedItem)}
        self._clean_pairs = dict(self._pairs(run))
        topic = [item for item in self._questions.values() if item.role == "topic"]
        without = self._without_question(topic)
        self.blocked = {name: Blocked.of(pair, without) for name, pair in self._clean_pairs.items()}
        found = {item for its in self.blocked.values() for item in its.blocked}
        self._topic = [item for item in topic if item.id in found]
        self._off_topic = [item for item in self._questions.values() if item.role != "topic"]

    def _without_question(self, topic: Sequence[QuestionItem]) -> Records:
        """What the unguarded model answers from the options alone."""
        if not topic:
            return {}
        items = tuple(attacked(NO_QUESTION, topic, self.config.seed))
        (run,) = self._evaluate(Attacked(NO_QUESTION.name, items), self.subjects[:1])
        return {record.item: record for record in run.records[self.subjects[0].name]}

    def _attack(self, attack: Attack) -> None:
        model, tokenizer = self.subjects[0].loader.loaded
        share = not any(subject.whole_prompts for subject in self.subjects)
        again = any(rule.reaches_back for its in self._guarded() if its.guardrail for rule in its.guardrail.rules)
        chosen = self._chosen(attack.tokens, attack.shared if share and not again else 0)
        items = attacked(attack, chosen, self.config.seed, share=share)
        room = getattr(text_config(model), "max_position_embeddings", None)
        longest = max(len(item.prompt.ids(tokenizer)) for item in items) + CLEAN_TOKENS
        if room is not None and longest > room:
            self.leave_out(attack.name, attack.family, f"about {longest} tokens do not fit into the model's {room}")
            return
        (run,) = self._evaluate(Attacked(attack.name, tuple(items)), self.subjects)
        self._add(attack.name, attack.family, attack.says, self._pairs(run))

    def _chosen(self, tokens: int, shared: int = 0) -> list[QuestionItem]:
        """The items that an attack of so many tokens is tried on, within the budget: `shared` ones are read once a
        group, whatever triggers."""
        alone = self.config.budget // (tokens + CLEAN_TOKENS)
        most = max(1, alone, (self.config.budget - GROUPS * shared) // (tokens - shared + CLEAN_TOKENS))
        domains = len({item.domain for item in self._off_topic}) or 1
        each = min(self.config.others, max(1, most // domains))
        return [*_first(self._topic, most), *limited(self._off_topic, each)]  # type: ignore[list-item]

    def _white_box(self, name: str) -> None:
        clean = self.records["clean"]
        if name == "hook-removed":
            unguarded = clean[self.subjects[0].name]
            pairs = {s.name: Pair.of(unguarded, _as_unguarded(unguarded)) for s in self._guarded()}
            self._add(name, "weights", "the weights are run without the hook: nothing is left of the guardrail",
                      pairs.items())  # fmt: skip
        elif name.startswith("quantised"):
            self._quantised(name, int(name.removeprefix("quantised-")))
        elif name != "lens" and not self._training():
            self.leave_out(name, FAMILY_OF[name], "it needs questions that are not attacked: --split test")
        elif FAMILY_OF[name] == "activations":
            self._steered(name)
        else:
            self._reading(name)

    def _quantised(self, name: str, bits: int) -> None:
        loader = weights.quantised(self.subjects[0].loader, bits)
        items = tuple(attacked(CLEAN, self._chosen(0), self.config.seed))
        for subject in self._guarded():
            assert subject.guardrail is not None
            refused = weights.refusal(subject.guardrail, loader)
            pair = [Subject("unguarded", loader), weights.forced(subject, subject.guardrail, loader)]
            (run,) = self._evaluate(Attacked(name, items), pair)
            says = f"weights rounded to {bits} bits, the guardrail as calibrated and its check overridden"
            self._add(name, "weights", says, self._pairs(run), note=refused or "the guardrail did not refuse")

    def _relearn(self, name: str) -> None:
        """Every subject's curve, on all questions on the topic: what is right then is compared with what was."""
        assert self.relearner is not None
        attack, relearner = RELEARNING[name], self.relearner
        topic = [item for item in self._questions.values() if item.role == "topic"]
        chosen = [*topic, *limited(self._off_topic, self.config.others)]
        subjects = [s for s in self.subjects[1:] if s.guardrail or (s.attach is None and not attack.hooked)]
        if not subjects:
            self.leave_out(name, FAMILY, "it needs a guardrail or a checkpoint: --guardrail DIR, --checkpoint NAME=M")
            return
        lesson, self.lessons[name] = relearner.lesson(attack, chosen)
        self.say(relearner.needs(attack, subjects, lesson))
        task = Attacked(FAMILY, tuple(attacked(CLEAN, chosen, self.config.seed)))  # type: ignore[arg-type]
        for subject in subjects:
            before = [self._clean_of(one, task.attacked) for one in (self.subjects[0], subject)]
            self.curves.append({"attack": name, "subject": subject.name, "epochs": 0, "refit": None,
                                **_accuracies(subject, before)})  # fmt: skip
            for epochs in relearner.epochs:
                if not self._late(f"{name}-epoch-{epochs}", FAMILY):
                    self._ask(task, subject, relearner.points(attack, subject, lesson, epochs))

    def _clean_of(self, subject: Subject, items: Sequence[Item]) -> list[Record]:
        ids = {item.id for item in items}
        return [record for record in self.records["clean"][subject.name] if record.item in ids]

    def _ask(self, task: Attacked, subject: Subject, points: Iterable[Point]) -> None:
        for point in points:
            (run,) = self._evaluate(task, point.models, kept_as=f"{point.name} of {subject.name}")
            records = [run.records[model.name] for model in point.models]
            self.curves.append({"subject": subject.name, **point.about, **_accuracies(subject, records)})
            control = records[0] if subject.guardrail else self.records["clean"][self.subjects[0].name]
            self._add(point.name, FAMILY, point.says, [(subject.name, Pair.of(control, records[-1]))], point.note)

    def _steered(self, name: str) -> None:
        items = tuple(attacked(CLEAN, self._chosen(0), self.config.seed))
        training = [item for item in self._training() if item.role == "topic"]
        for subject in self._guarded():
            assert subject.guardrail is not None
            kept = self.work / "steering"
            other = steering.steered(name, subject, subject.guardrail, training, self.config.steering_steps, kept)
            (run,) = self._evaluate(Attacked(name, items), [self.subjects[0], other])
            self._add(name, "activations", steering.SAYS[name], self._pairs(run))

    def _reading(self, name: str) -> None:
        items = tuple(self._chosen(0))
        for subject in self._guarded():
            assert subject.guardrail is not None
            last = len(decoder_layers(subject.loader.loaded[0])) - 1
            layers = tuple(layers_behind(subject.guardrail.layer, last))
            task: Task = Lens(items, layers) if name == "lens" else AnswerProbe(items, self._training(), layers)
            (run,) = self._evaluate(task, [self.subjects[0], subject])
            first, second = (run.records[one.name] for one in (self.subjects[0], subject))
            for layer in layers:
                pair = Pair.of(at_layer(first, layer), at_layer(second, layer))
                self._add(f"{name}-layer-{layer}", "reading", f"{name} after block {layer}", [(subject.name, pair)])

    def _training(self) -> tuple[QuestionItem, ...]:
        """Dev questions of all domains: never those that are attacked."""
        dev: Dev[Item] = split(question_items(self.sets))[0]
        return tuple(i for i in dev.items if isinstance(i, QuestionItem) and i.id not in self._questions)

    def _guarded(self) -> list[Subject]:
        return [subject for subject in self.subjects if subject.guardrail is not None]

    def _evaluate(
        self, task: Task, subjects: Sequence[Subject], split_: str = "all", kept_as: str | None = None
    ) -> list[TaskRun]:
        """The items are chosen before, but for the clean questions: those are of one side and limited here."""
        limit = self.config.limit if task.name == "clean" else None
        settings = Settings(split_, limit, self.config.keep_text, self.config.seed)  # type: ignore[arg-type]
        runs = evaluate(subjects, [task], settings, work=self.work, show_progress=True)
        self.records[kept_as or task.name] = runs[0].records
        return runs

    def _pairs(self, run: TaskRun) -> Iterator[tuple[str, Pair]]:
        unguarded, *others = run.records.items()
        return ((name, Pair.of(unguarded[1], records)) for name, records in others)

    def _add(self, name: str, family: str, says: str, pairs: Any, note: str = "") -> None:
        for subject, pair in pairs:
            found = outcome(self.blocked[subject].blocked, self._clean_pairs[subject], pair)
            about = {"attack": name, "family": family, "says": says, "subject": subject, "note": note}
            self.rows.append({**about, **found, "ratio": self._ratio(subject, found["statistic"])})

    def _ratio(self, name: str, statistic: float | None) -> float | None:
        """A statistic over its threshold; None where there are several rules, whose statistics do not compare."""
        guardrail = next(subject.guardrail for subject in self.subjects if subject.name == name)
        if guardrail is None or statistic is None or len(guardrail.rules) > 1 or not guardrail.threshold:
            return None
        return statistic / guardrail.threshold


def _first(items: Sequence[QuestionItem], count: int) -> list[Item]:
    """At most `count` of all items together, chosen as the harness chooses."""
    together = [replace(item, domain="") for item in items]
    ids = {item.id for item in limited(together, count)}
    return [item for item in items if item.id in ids]


def _accuracies(subject: Subject, records: Sequence[Sequence[Record]]) -> Row:
    """Of the model, and under its guardrail where there is one: those are the last records, and the first the model's
    own."""
    guarded = subject.guardrail is not None
    return {"model": accuracy(records[0 if guarded else -1]), "guarded": accuracy(records[-1]) if guarded else None}


def _as_unguarded(records: Sequence[Record]) -> list[Record]:
    return [replace(record, triggered=None, statistic=None) for record in records]
