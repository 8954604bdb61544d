"""`saeguard baseline`."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard.baselines.catalogue import BASELINES, Baseline, folder_bytes
from saeguard.cli.options import add_common, add_fields, add_model, config_of, console, emit
from saeguard.cli.texts import add_texts, fit_texts

HELP = "fit or train one of the methods that a guardrail is compared with"
EXAMPLE = (
    "saeguard baseline static --forget topic.jsonl --retain near=near.jsonl chat=chat.jsonl --out baselines/static\n"
    "  saeguard baseline list --json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A command for each method, with its settings, and `list`."""
    methods = parser.add_subparsers(dest="method", required=True, metavar="NAME")
    add_json(methods.add_parser("list", help="name the methods, what each needs and writes"))
    for one in BASELINES.values():
        sub = methods.add_parser(one.name, help=one.summary, description=f"{one.name}: {one.summary}.")
        add_model(sub)
        if "sae" in one.needs:
            sub.add_argument("--sae", metavar="S", help="SAE folder or hub id (default: the embedded one)")
        sub.add_argument("--layer", type=int, metavar="L", help="layer to work at, from 0, for a method that works at "
                         "one (default: the SAE's own)")  # fmt: skip
        add_texts(sub)
        sub.add_argument("--out", required=True, metavar="DIR", help="folder for the guardrail, prompt gate or model")
        sub.add_argument("--work", metavar="DIR", help="where finished work is kept (default: DIR.work)")
        if "sae" in one.needs:
            sub.add_argument("--force", action="store_true", help="go on although the SAE does not fit (see doctor)")
        add_common(sub)
        add_fields(sub, one.settings, skip=("seed",))


def add_json(parser: argparse.ArgumentParser) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines")


def run(args: argparse.Namespace) -> None:
    """List the methods, or run one."""
    if args.method == "list":
        _list(as_json=args.json)
        return
    from dataclasses import asdict
    from pathlib import Path

    baseline = BASELINES[args.method]
    cost = baseline.run(_trial(baseline, args, Path(args.work or f"{args.out}.work")))
    size = folder_bytes(Path(args.out))
    if args.json:
        chosen = asdict(config_of(baseline.settings, args))
        emit({"method": baseline.name, "settings": chosen, "out": args.out, "bytes": size, **asdict(cost)})
        return
    judged = "--checkpoint NAME=" if baseline.trains_weights else "--guardrail "
    console().print(f"Saved to {args.out} ({size / 1e6:.1f} MB) after {cost.seconds:.0f} s. "
                    f"Next: saeguard eval {judged}{args.out}")  # fmt: skip


def _trial(baseline: Baseline, args: argparse.Namespace, work: Any) -> Any:
    from pathlib import Path

    from saeguard.baselines.catalogue import Trial
    from saeguard.cli.loading import load

    def loaded() -> tuple[Any, Any]:
        found = load(args)
        return found.model, found.tokenizer

    forget, retain = fit_texts(args, retain="retain" in baseline.needs)
    sae, layer = _sae(baseline, args)
    return Trial(
        config_of(baseline.settings, args), loaded, forget, retain, sae, layer, Path(args.out), work, args.seed,
        source=args.model, device=args.device, force=getattr(args, "force", False),
    )  # fmt: skip


def _sae(baseline: Baseline, args: argparse.Namespace) -> tuple[Any, int | None]:
    """The SAE and its layer, for a method that needs them. Raises `UsageError`."""
    from saeguard.cli.loading import sae_and_layer

    if "sae" not in baseline.needs:
        return None, args.layer
    return sae_and_layer(args.sae, args.layer, embedded=args.model is None)


def _list(*, as_json: bool) -> None:
    rows = [
        {"name": one.name, "summary": one.summary, "needs": sorted(one.needs), "trains_weights": one.trains_weights}
        for one in BASELINES.values()
    ]
    if as_json:
        emit(rows)
        return
    from rich.table import Table

    table = Table("method", "what it does", "needs", "changes weights", box=None, header_style="dim")
    for one in BASELINES.values():
        table.add_row(one.name, one.summary, ", ".join(sorted(one.needs)), "yes" if one.trains_weights else "no")
    console().print(table)
