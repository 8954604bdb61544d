"""`sequence`: forget sets one after another.

After every step the guardrails so far are merged into one, which costs one hook pass, and the model is judged on the
questions of all sets: those forgotten by then, those still to come, and the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saeguard.config import FitConfig
from saeguard.errors import UsageError
from saeguard.evaluation.harness import Settings, evaluate
from saeguard.evaluation.result import make_result
from saeguard.evaluation.sources import QuestionSet
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.sweep import Place, Texts, kept_fit
from saeguard.evaluation.tasks.multiple_choice import MultipleChoice
from saeguard.guardrail import Guardrail, merge
from saeguard.progress import progress


@dataclass(frozen=True)
class Steps:
    """What is forgotten in turn: a forget set by name, of which there are questions of the same name."""

    loader: Loader
    place: Place
    forget: Mapping[str, str]
    retain: Mapping[str, str]
    questions: Sequence[QuestionSet]
    base: FitConfig
    work: Path

    def run(self, settings: Settings) -> tuple[Guardrail, dict[str, Any]]:
        """The guardrail after the last step, and a result with one subject for every step.

        Raises `UsageError` for a forget set without questions, `MergeError` where guardrails cannot become one.
        """
        if missing := set(self.forget) - {each.name for each in self.questions}:
            raise UsageError(f"no questions on {', '.join(sorted(missing))}: name them as the forget set is named")
        subjects, so_far = [Subject("unguarded", self.loader)], []
        with progress("fitting", len(self.forget), unit="steps") as advance:
            for number, (name, file) in enumerate(self.forget.items(), 1):
                config = replace(self.base, name=name)
                texts = Texts(file, {other: its for other, its in self.retain.items() if other != name})
                so_far.append(kept_fit(self.loader, self.place, texts, config, self.work))
                subjects.append(Subject.guarded(f"{number}: {name}", self.loader, merge(so_far)))
                advance(1)
        task = MultipleChoice(tuple(replace(s, role=self._role(s)) for s in self.questions))
        runs = evaluate(subjects, [task], settings, work=self.work / "answers", show_progress=True)
        last = subjects[-1].guardrail
        assert last is not None
        return last, make_result(subjects, runs, settings, {})

    def _role(self, questions: QuestionSet) -> Any:
        return "topic" if questions.name in self.forget else questions.role
