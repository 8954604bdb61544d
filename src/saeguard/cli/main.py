"""`saeguard COMMAND`: exit status 0 done, 1 the work failed, 2 wrong use.

A command's module has `HELP`, `EXAMPLE`, `add_arguments(parser)` and `run(args)`, which may return another status
than 0; it imports what is heavy only when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from saeguard.errors import GuardrailError, UsageError

COMMANDS = (
    "quickstart",
    "fit",
    "refit",
    "explain",
    "inspect",
    "generate",
    "chat",
    "serve",
    "eval",
    "attack",
    "sweep",
    "sequence",
    "baseline",
    "compare",
    "merge",
    "doctor",
    "train-sae",
    "bench",
)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="saeguard",
        description="Make a language model not know one topic at inference time, and prove how well that works.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"saeguard.cli.{name.replace('-', '_')}")
        sub = commands.add_parser(
            name, help=module.HELP, description=module.HELP, epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a user's error is one line on standard error, never a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    args = parser().parse_args(argv)
    try:
        status = args.run(args) or 0
    except UsageError as error:
        sys.stderr.write(f"saeguard {args.command}: {error}\n")
        return 2
    except GuardrailError as error:
        sys.stderr.write(f"saeguard {args.command}: {type(error).__name__}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(
            f"saeguard {args.command}: stopped. What was finished is kept; run the same command to go on.\n"
        )
        return 130
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
