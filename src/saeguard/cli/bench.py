"""`saeguard bench`."""

from __future__ import annotations

import argparse

from saeguard.cli import bench_serve
from saeguard.cli.options import add_common, add_model, console, emit

HELP = "time the product itself: overhead of a guardrail, throughput of fit, a server under load"
EXAMPLE = "saeguard bench overhead --guardrail guardrails/astronomy"
BENCHES = {
    "overhead": "forward passes with and without a guardrail, in pairs",
    "fit": "throughput of the offline pass against the bare truncated forward pass, and its memory",
    "serve": "a server under many clients, each answer compared with the one-by-one result; guarded against unguarded",
    "load": "time and memory to read an SAE from each format (writes 300 MB at a time to a temporary folder)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench`."""
    parser.add_argument("name", nargs="?", choices=BENCHES, metavar="NAME", help=f"one of: {', '.join(BENCHES)}")
    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--guardrail", metavar="DIR", help="guardrail to time (overhead, serve)")
    parser.add_argument("--sae", metavar="S", help="SAE folder or hub id (default: the embedded one)")
    parser.add_argument("--pairs", type=int, default=15, metavar="N", help="paired runs a case (default: 15)")
    parser.add_argument("--tokens", type=int, default=50_000, metavar="N", help="tokens of text (fit; default: 50000)")
    bench_serve.add_arguments(parser)
    add_model(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Run one benchmark and print its table."""
    from saeguard.errors import UsageError

    if args.list:
        console().print("\n".join(f"{name:10} {what}" for name, what in BENCHES.items()))
    elif args.name == "overhead":
        _overhead(args)
    elif args.name == "fit":
        _fit(args)
    elif args.name == "serve":
        bench_serve.run(args)
    elif args.name == "load":
        _load(args)
    else:
        raise UsageError(f"which benchmark? Expected one of: {', '.join(BENCHES)}")


def _overhead(args: argparse.Namespace) -> None:
    from rich.table import Table

    from saeguard import Guardrail
    from saeguard.bench.overhead import DECODE_BATCHES, PREFILL_TOKENS, overhead
    from saeguard.cli.loading import load
    from saeguard.errors import UsageError
    from saeguard.progress import progress

    if not args.guardrail:
        raise UsageError("bench overhead needs --guardrail DIR")
    guardrail = Guardrail.from_pretrained(args.guardrail)
    loaded = load(args)
    sae, _ = loaded.sae_and_layer(args.sae, guardrail.layer)
    total = args.pairs * (len(PREFILL_TOKENS) + len(DECODE_BATCHES))
    with progress("timing", total, unit="pairs") as advance:
        rows = overhead(loaded.model, loaded.tokenizer, guardrail, sae, pairs=args.pairs, advance=advance)
    if args.json:
        emit(rows)
        return
    table = Table("pass", "tokens", "batch", "unguarded ms", "guarded ms", "full SAE ms", "overhead")
    for name, some in rows.items():
        for row in some:
            times = [f"{row[key]:.1f}" for key in ("unguarded_ms", "guarded_ms", "full_sae_ms")]
            table.add_row(name, f"{row['tokens']}", f"{row['batch']}", *times, f"{row['overhead']:+.1%}")
    console().print(table)


def _fit(args: argparse.Namespace) -> None:
    from saeguard.bench.fit import fit_throughput
    from saeguard.cli.loading import load

    loaded = load(args)
    sae, layer = loaded.sae_and_layer(args.sae, None)
    row = fit_throughput(loaded.model, loaded.tokenizer, sae, layer, tokens=args.tokens)
    if args.json:
        emit(row)
    else:
        console().print("\n".join(f"{name:24} {value:,.2f}" for name, value in row.items()))


def _load(args: argparse.Namespace) -> None:
    from rich.table import Table

    from saeguard.bench.load import FORMATS, load_times
    from saeguard.progress import progress

    rows = []
    with progress("loading", len(FORMATS), unit="formats") as advance:
        for row in load_times():
            rows.append(row)
            advance(1)
    if args.json:
        emit({"load": rows})
        return
    table = Table("format", "file MB", "seconds", "CPU seconds", "peak memory growth / file")
    for row in rows:
        figures = (f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", f"{row['memory']:.2f}")
        table.add_row(row["format"], f"{row['megabytes']:.0f}", *figures)
    console().print(table)
