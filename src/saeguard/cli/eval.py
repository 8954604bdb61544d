"""`saeguard eval`."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard.cli.judging import MANY, add_report, add_sources, add_subjects, show, sources, subjects
from saeguard.cli.options import add_common, add_fields, config_of, console, emit, named_files
from saeguard.evaluation.config import DEFAULT_TASKS, TASKS, EvalConfig

HELP = "judge guardrails and other checkpoints: what is forgotten, and what else breaks"
EXAMPLE = "saeguard eval --guardrail guardrails/astronomy --tasks mcq near open perplexity --page eval.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `eval`."""
    add_subjects(parser)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(DEFAULT_TASKS), metavar="NAME",
                        help=f"what to judge on (default: {' '.join(DEFAULT_TASKS)}); --list names them")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the tasks and end")
    add_sources(parser)
    parser.add_argument("--fit-text", **MANY, metavar="NAME=FILE",
                        help="texts a guardrail was fitted on: judged items found in them are reported")  # fmt: skip
    parser.add_argument("--work", metavar="DIR", help="where finished work is kept (default: as OUT, ending in .work); "
                        "a killed run resumes there")  # fmt: skip
    parser.add_argument("--out", default="eval.json", metavar="FILE", help="the result (default: eval.json)")
    add_report(parser)
    parser.add_argument("--render", nargs="+", metavar="FILE", help="draw the report of this result again, without "
                        "running; of several on the same items, as one")  # fmt: skip
    add_common(parser)
    add_fields(parser, EvalConfig, skip=("seed",))


def run(args: argparse.Namespace) -> None:
    """Judge, write the result, show it."""
    from saeguard.evaluation.joining import joined
    from saeguard.evaluation.result import read_result, write_result

    if args.list:
        emit(list(TASKS)) if args.json else console().print("\n".join(TASKS))
        return
    if args.render:
        show(joined([read_result(path) for path in args.render]), args)
        return
    result = _judge(args)
    write_result(result, args.out)
    show(result, args)
    if not args.json:
        console().print(f"\nResult: {args.out}. Draw it again: saeguard eval --render {args.out} --page page.html")


def _judge(args: argparse.Namespace) -> dict[str, Any]:
    from pathlib import Path

    from saeguard.corpus import Corpus
    from saeguard.evaluation.catalogue import make_tasks
    from saeguard.evaluation.harness import Settings, evaluate
    from saeguard.evaluation.result import make_result

    config = config_of(EvalConfig, args)
    judged = subjects(args)
    guardrails = [subject.guardrail for subject in judged if subject.guardrail]
    tasks = make_tasks(args.tasks, sources(args, guardrails), config)
    settings = Settings(config.split, config.limit, config.keep_text, config.seed)
    work = Path(args.work or Path(args.out).with_suffix(".work"))
    runs = evaluate(judged, tasks, settings, work=work, show_progress=True)
    fitted = named_files(args.fit_text, "--fit-text")
    return make_result(judged, runs, settings, {n: Corpus.of(n, "forget", file) for n, file in fitted.items()})
