"""`saeguard generate`."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard.cli.options import add_common, add_model, console, emit

HELP = "answer prompts with a guardrail attached"
EXAMPLE = 'saeguard generate --guardrail guardrails/astronomy --compare "Why is Mars red?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `generate`."""
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to answer")
    parser.add_argument("--guardrail", required=True, metavar="DIR", help="guardrail folder or hub id")
    add_model(parser)
    parser.add_argument("--compare", action="store_true", help="also show the unguarded answer")
    parser.add_argument("--max-new-tokens", type=int, default=80, metavar="N", help="length of an answer (default: 80)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default)")
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Answer and print, with verdicts."""
    from saeguard import Guardrail
    from saeguard.cli.loading import load
    from saeguard.generate import Generation, answer

    guardrail = Guardrail.from_pretrained(args.guardrail)
    loaded = load(args)
    how = Generation(args.max_new_tokens, args.temperature)
    rows = []
    for prompt in args.prompts:
        guarded = answer(loaded.model, loaded.tokenizer, prompt, guardrail, how)
        row: dict[str, Any] = {"prompt": prompt, "guarded": guarded.text, "verdict": vars(guarded.verdict)}
        if args.compare:
            row["unguarded"] = answer(loaded.model, loaded.tokenizer, prompt, None, how).text
        rows.append(row)
        if not args.json:
            _show(row)
    if args.json:
        emit(rows)


def _show(row: dict[str, Any]) -> None:
    out, verdict = console(), row["verdict"]
    out.print(f"\n[bold]{_plain(row['prompt'])}[/bold]")
    if "unguarded" in row:
        out.print(f"[dim]unguarded[/dim]  {_plain(row['unguarded'])}")
    out.print(f"[dim]guarded[/dim]    {_plain(row['guarded'])}")
    at = f", at token {verdict['first_token']}" if verdict["triggered"] else ""
    state = "[red]triggered[/red]" if verdict["triggered"] else "[green]not triggered[/green]"
    out.print(f"{state} {verdict['rule']}: {verdict['statistic']:.3g} against {verdict['threshold']:.3g}{at}")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
