"""`saeguard refit`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from saeguard.cli.options import add_common, add_fields, config_of, console, emit, named_files
from saeguard.config import RefitConfig

if TYPE_CHECKING:
    from saeguard.guardrail import Guardrail

HELP = "a guardrail anew for its model after training, and how far that has moved"
EXAMPLE = (
    "saeguard refit guardrails/chemistry --model FINE_TUNED --sae SAE_FOLDER --forget chemistry.jsonl \\\n"
    "    --retain physics=physics.jsonl chat=chat.jsonl news=news.txt --out guardrails/chemistry-2"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `refit`."""
    parser.add_argument("guardrail", metavar="DIR", help="guardrail folder or hub id, of the model before training")
    parser.add_argument("--model", required=True, metavar="M", help="hub id or folder of the model after it")
    parser.add_argument("--sae", metavar="S", help="SAE folder or hub id (default: the one the guardrail names)")
    parser.add_argument("--forget", metavar="FILE",
                        help="best that it was fitted on; optional where features are kept")  # fmt: skip
    parser.add_argument("--retain", nargs="+", action="extend", default=[], metavar="NAME=FILE",
                        help="best those it was fitted on (default, without --forget: the starter set)")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the new guardrail")
    parser.add_argument("--work", metavar="DIR", help="folder for finished shards (default: DIR.work); a killed run "
                        "resumes there")  # fmt: skip
    add_common(parser)
    add_fields(parser, RefitConfig)


def run(args: argparse.Namespace) -> None:
    """Refit, save, and say how far the model moved and how good the new guardrail is."""
    from saeguard.cli.loading import load, sae_of
    from saeguard.cli.texts import fit_texts
    from saeguard.doctor.reading import Subject
    from saeguard.guardrail import Guardrail
    from saeguard.refit import refit
    from saeguard.report.terminal import print_report

    old = Guardrail.from_pretrained(args.guardrail)
    given = args.forget or args.retain
    forget, retain = (args.forget, named_files(args.retain)) if given else fit_texts(args)
    loaded = load(args)
    subject = Subject(loaded.model, loaded.tokenizer, sae_of(old, args.sae), old.layer)
    guardrail = refit(
        old, subject, forget=forget, retain=retain, config=config_of(RefitConfig, args),
        work_dir=args.work or f"{args.out}.work", show_progress=True,
    )  # fmt: skip
    folder = guardrail.save_pretrained(args.out)
    if args.json:
        emit({"artifact": str(folder), "features": list(guardrail.features), "threshold": guardrail.threshold,
              "refit": guardrail.evidence["refit"]})  # fmt: skip
        return
    print_report(guardrail, console())
    _print_drift(guardrail)
    console().print(f"\nSaved to {folder}. Next: saeguard inspect {folder} --page page.html")


def _print_drift(guardrail: Guardrail) -> None:
    """What the old guardrail sees in the changed model, then what was kept of it."""
    from saeguard.report.formatting import percent, visible

    refit, out = guardrail.evidence["refit"], console()
    table = Table("text", "features agree", "statistic, 5 to 95 %", "now", "triggered", "now", box=None,
                  header_style="dim")  # fmt: skip
    for name, drift in refit["drift"].items():
        quantiles, triggered = ([drift[part][when] for when in ("then", "now")] for part in ("quantiles", "triggered"))
        table.add_row(
            Text(visible(name) + ("" if drift["same_text"] else " (other text)")), f"{drift['agreement']:.3f}",
            *(_span(its) for its in quantiles), *(percent(rate["rate"]) for rate in triggered),
        )  # fmt: skip
    out.print(f"\n[bold]How far the model moved, as the old guardrail sees it[/] (threshold {refit['threshold']:.4g})")
    out.print(table)
    out.print(f"{refit['features_kept']} of {len(guardrail.features)} features are those of the old guardrail; the "
              f"threshold was {refit['threshold']:.4g} and is {guardrail.threshold:.4g}.")  # fmt: skip


def _span(quantiles: dict[str, Any]) -> str:
    values = list(quantiles.values())
    return f"{values[0]:.3g} to {values[-1]:.3g}" if values else "nothing read"
