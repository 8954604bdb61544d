"""The texts to fit on: options for them, and those of the starter set where none are given."""

from __future__ import annotations

import argparse

from saeguard.cli.options import named_files
from saeguard.errors import UsageError


def add_texts(parser: argparse.ArgumentParser) -> None:
    """`--forget` and `--retain`."""
    parser.add_argument("--forget", metavar="FILE", help="texts to forget (default: those of the starter set)")
    parser.add_argument("--retain", nargs="+", action="extend", default=[], metavar="NAME=FILE",
                        help="named texts that must stay untouched")  # fmt: skip


def fit_texts(args: argparse.Namespace, *, retain: bool = True) -> tuple[str, dict[str, str]]:
    """The forget file and the retain files by name; `retain`: whether some are needed. Raises `UsageError`."""
    from saeguard.embedded import starter_set

    if args.forget and (args.retain or not retain):
        return args.forget, named_files(args.retain)
    if args.forget or args.retain:
        raise UsageError("--forget and --retain go together (without both, the starter set is used)")
    starter = starter_set()
    return str(starter.forget), {name: str(path) for name, path in starter.retain.items()}
