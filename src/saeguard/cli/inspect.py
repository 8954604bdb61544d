"""`saeguard inspect`."""

from __future__ import annotations

import argparse

from saeguard.cli.options import console, emit

HELP = "what a guardrail holds and how good it is, as a table or a page"
EXAMPLE = "saeguard inspect guardrails/astronomy --page page.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    parser.add_argument("guardrail", metavar="DIR", help="guardrail folder or hub id")
    parser.add_argument("--page", metavar="FILE", help="write one self-contained HTML page with plots")
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines")


def run(args: argparse.Namespace) -> None:
    """Print the table, the JSON, or write the page."""
    from dataclasses import asdict

    from saeguard import Guardrail
    from saeguard.report.page import write_page
    from saeguard.report.terminal import print_report

    guardrail = Guardrail.from_pretrained(args.guardrail)
    if args.page:
        write_page(guardrail, args.page)
        console(quiet=args.json).print(f"Wrote {args.page}")
    if args.json:
        rules = [
            {"name": rule.name, "threshold": rule.threshold, "gate": rule.gate.kind, "action": rule.action,
             "clamp": asdict(rule.clamp), "features": [asdict(f) for f in rule.selected], "evidence": rule.evidence}
            for rule in guardrail.rules
        ]  # fmt: skip
        emit({"layer": guardrail.layer, "model": guardrail.model, "sae": guardrail.sae, "rules": rules})
    elif not args.page:
        print_report(guardrail, console())
