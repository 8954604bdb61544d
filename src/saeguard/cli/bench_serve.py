"""`saeguard bench serve`: start a server (or take one that runs), load it, compare, report."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from saeguard.cli.options import console, emit
from saeguard.errors import EngineError, UsageError

PAIRED_PROMPTS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench serve`."""
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="clients at once (serve; default: 32)")
    parser.add_argument("--minutes", type=float, default=5.0, metavar="X", help="time of load (serve; default: 5)")
    parser.add_argument("--cases", type=int, default=40, metavar="N", help="different requests (serve; default: 40)")
    parser.add_argument("--url", metavar="URL", help="a running server (serve; default: one is started)")


def run(args: argparse.Namespace) -> None:
    """Compute what is expected, load the server, compare; then throughput in pairs (`--pairs 0`: none)."""
    from saeguard import Guardrail
    from saeguard.bench.pairs import throughput_pairs
    from saeguard.bench.serve import Load, cases, judge_others, report
    from saeguard.cli.loading import load
    from saeguard.progress import progress

    if not args.guardrail:
        raise UsageError("bench serve needs --guardrail DIR")
    guardrail = Guardrail.from_pretrained(args.guardrail)
    loaded = load(args)
    with progress("one by one", args.cases, unit="cases") as advance:
        its = cases(loaded.model, loaded.tokenizer, guardrail, args.cases, advance)
    figures: dict[str, Any] = {"clients": args.clients, "minutes": args.minutes, "cases": len(its)}
    with _server(args) as (target, ready):
        outcome = Load(target, its, seed=args.seed, seconds=60 * args.minutes).run(args.clients)
    judge_others(outcome, loaded.model, loaded.tokenizer, guardrail)
    figures |= ready | report(outcome, 60 * args.minutes)
    if args.pairs:
        prompts = [its[i % len(its)].prompt for i in range(PAIRED_PROMPTS)]
        with progress("guarded and not", args.pairs, unit="pairs") as advance:
            figures |= throughput_pairs(loaded.model, loaded.tokenizer, guardrail, prompts, args.pairs, advance)
    if args.json:
        emit(figures)
        return
    for name, value in figures.items():
        console().print(f"{name:28} {f'{value:,.2f}' if isinstance(value, float) else value}")


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A server under `--url`, or one of our own until the block ends; and how long it took to be ready."""
    from saeguard.serving.load import Target

    if args.url:
        listed = json.loads(Target(args.url, "").get("/v1/models"))
        yield Target(args.url, listed["data"][0]["id"]), {}
        return
    options = {"--guardrail": args.guardrail, "--model": args.model, "--device": args.device, "--dtype": args.dtype}
    words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    command = [sys.executable, "-m", "saeguard.cli.main", "serve", *words, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            found = read_ready(child)
            yield Target(found["url"], found["model"]), {
                "ready_seconds": found["seconds"], "load_seconds": found["load_seconds"],
            }  # fmt: skip
        finally:
            child.terminate()


def read_ready(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What a server prints when it is ready: one JSON object over several lines. Raises `EngineError`."""
    text = ""
    for line in child.stdout or ():
        text += line
        if line.rstrip() == "}":
            found: dict[str, Any] = json.loads(text)
            return found
    raise EngineError(f"the server did not start (exit status {child.wait()}); run `saeguard serve` to see why")
