"""`saeguard chat`."""

from __future__ import annotations

import argparse

from saeguard.cli.options import add_common, add_model, console

HELP = "talk to a guarded model; an empty line or Ctrl-D ends"
EXAMPLE = "saeguard chat --guardrail guardrails/astronomy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `chat`."""
    parser.add_argument("--guardrail", required=True, metavar="DIR", help="guardrail folder or hub id")
    add_model(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, default=120, metavar="N", help="length of an answer (default: 120)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default)")
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Read, answer, print the verdict, until an empty line. The gate sees the whole conversation."""
    from rich.markup import escape

    from saeguard import Guardrail
    from saeguard.cli.loading import load
    from saeguard.cli.options import emit
    from saeguard.generate import Generation, answer

    guardrail = Guardrail.from_pretrained(args.guardrail)
    loaded = load(args)
    how = Generation(args.max_new_tokens, args.temperature)
    messages: list[dict[str, str]] = []
    out = console()
    while (text := _ask(quiet=args.json)).strip():
        messages.append({"role": "user", "content": text})
        reply = answer(loaded.model, loaded.tokenizer, messages, guardrail, how)
        messages.append({"role": "assistant", "content": reply.text})
        if args.json:
            emit({"answer": reply.text, "verdict": vars(reply.verdict)})
            continue
        out.print(escape(reply.text))
        if reply.verdict and reply.verdict.triggered:
            out.print(f"[dim]({reply.verdict.rule} triggered at token {reply.verdict.first_token})[/dim]")


def _ask(*, quiet: bool) -> str:
    try:
        return input("" if quiet else "> ")
    except EOFError:
        return ""
