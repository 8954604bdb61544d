"""`saeguard merge`."""

from __future__ import annotations

import argparse

from saeguard.cli.options import console, emit

HELP = "several guardrails on one layer of one model into one, for one pass"
EXAMPLE = "saeguard merge guardrails/astronomy guardrails/chemistry --out guardrails/both"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `merge`."""
    parser.add_argument("guardrails", nargs="+", metavar="DIR", help="guardrail folders or hub ids")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the merged guardrail")
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines")


def run(args: argparse.Namespace) -> None:
    """Merge and save."""
    from saeguard import Guardrail, merge

    merged = merge([Guardrail.from_pretrained(folder) for folder in args.guardrails])
    folder = merged.save_pretrained(args.out)
    if args.json:
        emit({"artifact": str(folder), "rules": [rule.name for rule in merged.rules]})
    else:
        console().print(f"Merged {', '.join(rule.name for rule in merged.rules)} into {folder}")
