"""`saeguard quickstart`."""

from __future__ import annotations

import argparse
import time
from typing import Any

from saeguard.cli.options import add_common, console, emit

HELP = "the whole story on the embedded default: fit, judge, show"
EXAMPLE = "saeguard quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `quickstart`."""
    parser.add_argument(
        "--out",
        default="guardrails/astronomy",
        metavar="DIR",
        help="folder for the guardrail (default: guardrails/astronomy)",
    )
    parser.add_argument("--page", metavar="FILE", help="the page to look at (default: DIR.html)")
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Run, then print the JSON object or the tables."""
    started = time.perf_counter()
    from pathlib import Path

    import torch

    from saeguard import Guardrail
    from saeguard.embedded import embedded_model
    from saeguard.quickstart import run as run_quickstart
    from saeguard.report.page import write_page

    torch.manual_seed(args.seed)
    model, tokenizer = embedded_model(device=args.device, dtype=args.dtype)
    out = Path(args.out)
    result = run_quickstart(model, tokenizer, out, started=started)
    page = Path(args.page or out.with_name(f"{out.name}.html"))
    write_page(Guardrail.from_pretrained(out), page, result)
    if args.json:
        emit(result)
    else:
        _show(result, page)


def _show(result: dict[str, Any], page: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    table = Table(
        "questions",
        "role",
        "n",
        "unguarded",
        "guarded",
        "triggered",
        title="Accuracy (chance 0.25) with 95 % intervals",
    )
    for row in result["sets"]:
        table.add_row(
            row["name"], row["role"], str(row["n"]), _rate(row, "unguarded", "unguarded_interval"),
            _rate(row, "guarded", "guarded_interval"), _rate(row, "trigger_rate", "trigger_interval"),
        )  # fmt: skip
    out.print(table)
    worst = max(result["false_positives"].items(), key=lambda pair: pair[1])
    out.print(
        f"Held-out text: {result['caught']:.0%} of topic passages trigger; of retain passages at most {worst[1]:.1%} "
        f"({worst[0]}), allowed {result['alpha']:.0%} in each of {len(result['false_positives'])} domains.\n"
    )
    for example in result["examples"]:
        state = "[red]triggered[/]" if example["triggered"] else "[green]not triggered[/]"
        out.print(f"[bold]{escape(example['prompt'])}[/bold]  {state}")
        out.print(f"  [dim]unguarded[/dim]  {escape(' '.join(example['unguarded'].split()))}")
        out.print(f"  [dim]guarded[/dim]    {escape(' '.join(example['guarded'].split()))}\n")
    out.print(
        f"{result['seconds']:.0f} s, {result['peak_memory_mb']:,.0f} MB. "
        f"Guardrail: {result['artifact']}   Page: {page}\n\n"
        "Next, with your own model:\n"
        "  saeguard fit --model MODEL --sae SAE --layer L --forget topic.jsonl "
        "--retain near=near.jsonl chat=chat.jsonl --out guardrails/mine\n"
        f"  saeguard chat --guardrail {result['artifact']}"
    )


def _rate(row: dict[str, Any], key: str, interval: str) -> str:
    low, high = row[interval]
    return f"{row[key]:.2f} [dim]({low:.2f}-{high:.2f})[/dim]"
