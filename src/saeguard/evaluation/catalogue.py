"""From names to tasks: what `--tasks` can ask for, and what each needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saeguard.corpus import Corpus
from saeguard.embedded import StarterSet, starter_set
from saeguard.errors import UsageError
from saeguard.evaluation.config import EvalConfig
from saeguard.evaluation.judge import Judge
from saeguard.evaluation.result import read_result, scores_of
from saeguard.evaluation.sources import QuestionSet, TextSet, benchmark
from saeguard.evaluation.task import Task
from saeguard.evaluation.tasks.lm_eval import LMEval
from saeguard.evaluation.tasks.mtbench import MTBench
from saeguard.evaluation.tasks.multiple_choice import MultipleChoice
from saeguard.evaluation.tasks.muse import Muse
from saeguard.evaluation.tasks.open import OpenAnswers
from saeguard.evaluation.tasks.perplexity import Perplexity
from saeguard.evaluation.tasks.tofu import Tofu
from saeguard.guardrail import Guardrail


@dataclass(frozen=True)
class Sources:
    """Where items come from. `held_out` names text sets on whose other splits a guardrail was fitted."""

    questions: tuple[QuestionSet, ...] = ()
    texts: tuple[TextSet, ...] = ()
    held_out: frozenset[str] = frozenset()
    judge_key: str | None = None


def named_benchmark(name: str, data: str | None) -> tuple[tuple[QuestionSet, ...], tuple[TextSet, ...]]:
    """Questions and texts of a benchmark; those of WMDP have no texts."""
    if name != "starter":
        return tuple(benchmark(name, data)), ()
    starter = starter_set()
    questions = tuple(QuestionSet(n, StarterSet.role(n), tuple(its)) for n, its in starter.questions.items())
    topic = starter.forget.stem
    texts = {topic: starter.forget, **starter.retain}
    return questions, tuple(TextSet(n, StarterSet.role(n), Corpus.of(n, "retain", path)) for n, path in texts.items())


def held_out(guardrails: Sequence[Guardrail], texts: Sequence[TextSet]) -> frozenset[str]:
    """The text sets that a guardrail was fitted on, by their fingerprint: only their test split may judge it."""
    fitted = {
        corpus["fingerprint"]
        for guardrail in guardrails
        for rule in guardrail.rules
        for corpus in rule.evidence.get("corpora", {}).values()
    }
    return frozenset(each.name for each in texts if each.corpus.summary().fingerprint in fitted)


def make_tasks(names: Sequence[str], sources: Sources, config: EvalConfig) -> list[Task]:
    """The tasks by name. Raises `UsageError` where one lacks what it needs."""
    return [_MAKERS[name](sources, config) for name in names]


def _mcq(sources: Sources, config: EvalConfig) -> Task:
    return _choice("mcq", _questions(sources, "mcq", ("topic", "far")), config)


def _near(sources: Sources, config: EvalConfig) -> Task:
    return _choice("near", _questions(sources, "near", ("near",)), config)


def _choice(name: str, sets: tuple[QuestionSet, ...], config: EvalConfig) -> Task:
    """The orders of the paper's protocol are of lettered options, so it asks by letter."""
    form = "letters" if config.protocol == "paper" else config.form
    return MultipleChoice(sets, name, form, config.protocol)


def _open(sources: Sources, config: EvalConfig) -> Task:
    return OpenAnswers(_questions(sources, "open", ("topic", "near", "far")), config.max_new_tokens)


def _perplexity(sources: Sources, config: EvalConfig) -> Task:
    if not sources.texts:
        raise UsageError("the task perplexity needs texts: --topic-text, --near-text or --far-text NAME=FILE")
    return Perplexity(sources.texts, sources.held_out, config.max_tokens)


def _questions(sources: Sources, task: str, roles: Sequence[str]) -> tuple[QuestionSet, ...]:
    found = tuple(each for each in sources.questions if each.role in roles)
    if not found:
        options = " or ".join(f"--{role} NAME=FILE" for role in roles)
        raise UsageError(f"the task {task} needs questions: {options}, or --benchmark")
    return found


def _muse(sources: Sources, config: EvalConfig) -> Task:
    return Muse(Path(_needed(config.muse, "muse", "--muse DIR")), config.retrained_auc)


def _tofu(sources: Sources, config: EvalConfig) -> Task:
    return tofu(Path(_needed(config.tofu, "tofu", "--tofu DIR")), config.never_taught)


def tofu(folder: Path, never_taught: str | None, *, whole: bool = True) -> Tofu:
    """TOFU, with the result of a model that was never taught it; not `whole`, it has a dev side."""
    ratios = scores_of(read_result(never_taught), "tofu", "forget", "truth_ratio") if never_taught else {}
    return Tofu(folder, ratios, whole=whole)


def _mtbench(sources: Sources, config: EvalConfig) -> Task:
    path = Path(_needed(config.mt_bench, "mtbench", "--mt-bench FILE"))
    judge = None if config.judge is None else Judge(config.judge, config.judge_model, sources.judge_key)
    return MTBench(path, judge, config.runs)


def _lm_eval(sources: Sources, config: EvalConfig) -> Task:
    if not config.lm_eval_tasks:
        raise UsageError("the task lm-eval needs --lm-eval-tasks NAME …")
    return LMEval(config.lm_eval_tasks, config.lm_eval_include, config.limit)


def _needed(value: str | None, task: str, option: str) -> str:
    if value is None:
        raise UsageError(f"the task {task} needs {option}")
    return value


_MAKERS: Mapping[str, Callable[[Sources, EvalConfig], Task]] = {
    "mcq": _mcq, "near": _near, "open": _open, "perplexity": _perplexity, "muse": _muse, "tofu": _tofu,
    "mtbench": _mtbench, "lm-eval": _lm_eval,
}  # fmt: skip
