"""`saeguard eval`."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from saeguard.choices import Role
from saeguard.cli.options import add_common, add_fields, add_model, config_of, console, emit, named_files
from saeguard.errors import UsageError
from saeguard.evaluation.config import BENCHMARKS, DEFAULT_TASKS, TASKS, EvalConfig

if TYPE_CHECKING:
    from saeguard.evaluation.catalogue import Sources
    from saeguard.evaluation.subject import Subject

HELP = "judge guardrails and other checkpoints: what is forgotten, and what else breaks"
EXAMPLE = "saeguard eval --guardrail guardrails/astronomy --tasks mcq near open perplexity --page eval.html"
JUDGE_KEY = "SAEGUARD_JUDGE_KEY"
ROLES: dict[Role, str] = {"topic": "on the topic", "near": "on neighbouring topics", "far": "on anything else"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `eval`."""
    many: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    parser.add_argument("--guardrail", **many, metavar="[NAME=]DIR", help="guardrail folders or hub ids to judge")
    parser.add_argument(
        "--checkpoint", **many, metavar="NAME=M", help="other models to judge: hub ids, folders, PEFT adapter folders"
    )
    add_model(parser)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(DEFAULT_TASKS), metavar="NAME",
                        help=f"what to judge on (default: {' '.join(DEFAULT_TASKS)}); --list names them")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the tasks and end")
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="a ready choice of topic, near and far questions "
                        "(default: starter, unless questions or texts are given)")  # fmt: skip
    parser.add_argument("--data", metavar="DIR", help="folder with the benchmark's files, instead of the hub")
    for role, what in ROLES.items():
        parser.add_argument(f"--{role}", **many, metavar="NAME=FILE", help=f"questions {what}: .jsonl[.gz], .parquet, "
                            "FILE#SUBJECT or hf:DATASET[:CONFIG]:SPLIT")  # fmt: skip
    for role, what in ROLES.items():
        parser.add_argument(f"--{role}-text", **many, metavar="NAME=FILE", help=f"texts {what}, for perplexity")
    parser.add_argument("--fit-text", **many, metavar="NAME=FILE",
                        help="texts a guardrail was fitted on: judged items found in them are reported")  # fmt: skip
    parser.add_argument("--work", metavar="DIR", help="where finished work is kept (default: OUT without .json, "
                        "with .work); a killed run resumes there")  # fmt: skip
    parser.add_argument("--out", default="eval.json", metavar="FILE", help="the result (default: eval.json)")
    parser.add_argument("--page", metavar="FILE", help="also write the report as one HTML page")
    parser.add_argument("--markdown", metavar="FILE", help="also write the report as Markdown (FILE.md)")
    parser.add_argument("--render", metavar="FILE", help="draw the report of this result again, without running")
    add_common(parser)
    add_fields(parser, EvalConfig, skip=("seed",))


def run(args: argparse.Namespace) -> None:
    """Judge, write the result, show it."""
    from saeguard.evaluation.result import read_result, write_result

    if args.list:
        _show_list(args)
        return
    result = read_result(args.render) if args.render else _judge(args)
    if not args.render:
        write_result(result, args.out)
    _show(result, args)


def _judge(args: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from saeguard.corpus import Corpus
    from saeguard.evaluation.catalogue import make_tasks
    from saeguard.evaluation.harness import Settings, evaluate
    from saeguard.evaluation.result import make_result

    config = config_of(EvalConfig, args)
    subjects = _subjects(args)
    tasks = make_tasks(args.tasks, _sources(args, subjects), config)
    settings = Settings(config.split, config.limit, config.keep_text, config.seed)
    work = Path(args.work or Path(args.out).with_suffix(".work"))
    runs = evaluate(subjects, tasks, settings, work=work, show_progress=True)
    fitted = named_files(args.fit_text, "--fit-text")
    return make_result(subjects, runs, settings, {n: Corpus.of(n, "forget", file) for n, file in fitted.items()})


def _subjects(args: argparse.Namespace) -> list[Subject]:
    """The unguarded model, then the guarded ones, then other checkpoints."""
    from pathlib import Path

    from saeguard import Guardrail
    from saeguard.cli.loading import load
    from saeguard.evaluation.subject import Loader, Subject, checkpoint

    def base() -> tuple[Any, Any]:
        loaded = load(args)
        return loaded.model, loaded.tokenizer

    loader = Loader(base)
    subjects = [Subject("unguarded", loader)]
    for one in args.guardrail:
        name, _, folder = one.rpartition("=")
        subjects.append(Subject.guarded(name or Path(folder).name, loader, Guardrail.from_pretrained(folder)))
    for name, source in named_files(args.checkpoint, "--checkpoint").items():
        subjects.append(Subject(name, checkpoint(source, base, device=args.device, dtype=args.dtype)))
    return subjects


def _sources(args: argparse.Namespace, subjects: list[Subject]) -> Sources:
    from saeguard.corpus import Corpus
    from saeguard.evaluation.catalogue import Sources, held_out, named_benchmark
    from saeguard.evaluation.sources import TextSet, question_set

    given = vars(args)
    questions = [
        question_set(name, role, file)
        for role in ROLES
        for name, file in named_files(given[role], f"--{role}").items()
    ]  # fmt: skip
    texts = [
        TextSet(name, role, Corpus.of(name, "retain", file))
        for role in ROLES
        for name, file in named_files(given[f"{role}_text"], f"--{role}-text").items()
    ]
    if args.benchmark or not (questions or texts):
        more_questions, more_texts = named_benchmark(args.benchmark or "starter", args.data)
        questions, texts = [*questions, *more_questions], [*texts, *more_texts]
    names = [one.name for one in questions]
    if len(set(names)) < len(names):
        raise UsageError("two sets of questions have one name: each needs its own")
    guardrails = [subject.guardrail for subject in subjects if subject.guardrail]
    return Sources(tuple(questions), tuple(texts), held_out(guardrails, texts), os.environ.get(JUDGE_KEY))


def _show_list(args: argparse.Namespace) -> None:
    if args.json:
        emit(list(TASKS))
    else:
        for name in TASKS:
            console().print(name)


def _show(result: dict[str, Any], args: argparse.Namespace) -> None:
    from saeguard.report.evaluation_page import write_report
    from saeguard.report.evaluation_terminal import print_evaluation

    for path in filter(None, (args.page, args.markdown)):
        write_report(result, path)
        console(quiet=args.json).print(f"Wrote {path}")
    if args.json:
        emit({key: value for key, value in result.items() if key != "records"})
        return
    print_evaluation(result, console())
    if not args.render:
        console().print(f"\nResult: {args.out}. Draw it again: saeguard eval --render {args.out} --page page.html")
