"""What the judging commands share: options that say on what to judge, and the items they name."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saeguard.choices import Role
from saeguard.cli.options import add_model, named_files
from saeguard.errors import UsageError
from saeguard.evaluation.config import BENCHMARKS

if TYPE_CHECKING:
    from saeguard.evaluation.catalogue import Sources
    from saeguard.evaluation.subject import Subject
    from saeguard.guardrail import Guardrail

JUDGE_KEY = "SAEGUARD_JUDGE_KEY"
ROLES: dict[Role, str] = {"topic": "on the topic", "near": "on neighbouring topics", "far": "on anything else"}
MANY: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}


def add_subjects(parser: argparse.ArgumentParser) -> None:
    """Options for what is judged."""
    parser.add_argument(
        "--guardrail", **MANY, metavar="[NAME=]DIR", help="folders (or hub ids) of guardrails and prompt gates to judge"
    )
    parser.add_argument(
        "--checkpoint", **MANY, metavar="NAME=M", help="other models to judge: hub ids, folders, PEFT adapter folders"
    )
    parser.add_argument("--normalise", action="store_true", help="let guardrails read prompts also with odd spelling "
                        "undone: look-alikes, spaced letters, leetspeak, ROT13, Base64 and others")  # fmt: skip
    add_model(parser)


def subjects(args: argparse.Namespace) -> list[Subject]:
    """The unguarded model, then the guarded ones, then other checkpoints."""
    from functools import partial
    from pathlib import Path

    from saeguard.cli.loading import model_of
    from saeguard.evaluation.subject import Loader, Subject, checkpoint

    base = partial(model_of, args)
    loader = Loader(base)
    subjects = [Subject("unguarded", loader)]
    for one in args.guardrail:
        name, _, folder = one.rpartition("=")
        subjects.append(Subject.fitted(name or Path(folder).name, loader, folder, normalise=args.normalise))
    for name, source in named_files(args.checkpoint, "--checkpoint").items():
        subjects.append(Subject(name, checkpoint(source, base, device=args.device, dtype=args.dtype)))
    return subjects


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Options for questions and texts."""
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="a ready choice of topic, near and far questions "
                        "(default: starter, unless questions or texts are given)")  # fmt: skip
    parser.add_argument("--data", metavar="DIR", help="folder with the benchmark's files, instead of the hub")
    for role, what in ROLES.items():
        parser.add_argument(f"--{role}", **MANY, metavar="NAME=FILE", help=f"questions {what}: .jsonl[.gz], .parquet, "
                            "FILE#SUBJECT or hf:DATASET[:CONFIG]:SPLIT")  # fmt: skip
    for role, what in ROLES.items():
        parser.add_argument(f"--{role}-text", **MANY, metavar="NAME=FILE", help=f"texts {what}, for perplexity")


def sources(args: argparse.Namespace, guardrails: Sequence[Guardrail]) -> Sources:
    """The questions and texts that the options name. Raises `UsageError` or `CorpusError`."""
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
    for kind, names in (("questions", [one.name for one in questions]), ("texts", [one.name for one in texts])):
        if len(set(names)) < len(names):
            raise UsageError(f"two sets of {kind} have one name: each needs its own")
    return Sources(tuple(questions), tuple(texts), held_out(guardrails, texts), os.environ.get(JUDGE_KEY))


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Write the page and the Markdown that were asked for, then print the JSON or the tables."""
    from saeguard.cli.options import console, emit
    from saeguard.report.evaluation_page import write_report
    from saeguard.report.evaluation_terminal import print_evaluation

    for path in filter(None, (args.page, args.markdown)):
        write_report(result, path)
        console(quiet=args.json).print(f"Wrote {path}")
    if args.json:
        emit({key: value for key, value in result.items() if key != "records"})
    else:
        print_evaluation(result, console())


def add_report(parser: argparse.ArgumentParser) -> None:
    """Options for the report."""
    parser.add_argument("--page", metavar="FILE", help="write the report as one HTML page")
    parser.add_argument("--markdown", metavar="FILE", help="write the report as Markdown (FILE.md)")
