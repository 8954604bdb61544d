"""`saeguard sequence`."""

from __future__ import annotations

import argparse

from saeguard.cli.judging import add_report, add_sources, show, sources
from saeguard.cli.options import add_common, add_fields, add_model, console, fit_config, named_files
from saeguard.config import PRESETS, FitConfig

HELP = "forget several sets one after another, and judge after every step"
EXAMPLE = (
    "saeguard sequence --forget astronomy=stars.jsonl biology=cells.jsonl \\\n"
    "    --retain arts=arts.jsonl law=law.jsonl chat=chat.jsonl --out guardrails/both --page sequence.html"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sequence`."""
    add_model(parser)
    parser.add_argument("--sae", metavar="S", help="SAE folder or hub id (default: the embedded one)")
    parser.add_argument("--layer", type=int, metavar="L", help="guarded layer, from 0 (default: the SAE's own)")
    parser.add_argument("--forget", required=True, nargs="+", action="extend", metavar="NAME=FILE",
                        help="texts to forget, in this order; questions of the same name judge each")  # fmt: skip
    parser.add_argument("--retain", required=True, nargs="+", action="extend", metavar="NAME=FILE",
                        help="named texts that must stay untouched; one of a forget set's name is left out of its "
                        "own step")  # fmt: skip
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default", help="the settings of every fit")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the merged guardrail")
    parser.add_argument("--work", metavar="DIR", help="where finished work is kept (default: DIR.work)")
    parser.add_argument("--result", metavar="FILE", help="the result (default: DIR.json)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most this many questions of each domain")
    add_sources(parser)
    add_report(parser)
    add_common(parser)
    add_fields(parser, FitConfig, skip=("seed", "name"))


def run(args: argparse.Namespace) -> None:
    """Fit step by step, judge all, save the merged guardrail."""
    from pathlib import Path

    from saeguard.cli.loading import load
    from saeguard.evaluation.harness import Settings
    from saeguard.evaluation.result import write_result
    from saeguard.evaluation.sequence import Steps
    from saeguard.evaluation.subject import Loader
    from saeguard.evaluation.sweep import Place

    forget, retain = named_files(args.forget, "--forget"), named_files(args.retain)
    loaded = load(args)
    sae, layer = loaded.sae_and_layer(args.sae, args.layer)
    steps = Steps(
        Loader(lambda: (loaded.model, loaded.tokenizer)), Place("default", layer, sae), forget, retain,
        sources(args, []).questions, fit_config(args), Path(args.work or f"{args.out}.work"),
    )  # fmt: skip
    guardrail, result = steps.run(Settings(limit=args.limit, seed=args.seed))
    guardrail.save_pretrained(args.out)
    write_result(result, args.result or f"{args.out}.json")
    show(result, args)
    if not args.json:
        console().print(f"\nThe merged guardrail: {args.out}. Result: {args.result or f'{args.out}.json'}")
