"""`saeguard fit`."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard.cli.options import add_common, add_fields, add_model, console, emit, fit_config, named_files
from saeguard.config import PRESETS, FitConfig
from saeguard.errors import UsageError

HELP = "from texts to forget and texts to keep to a guardrail"
EXAMPLE = (
    "saeguard fit --model HuggingFaceTB/SmolLM2-135M-Instruct --sae SAE_FOLDER --layer 6 \\\n"
    "    --forget chemistry.jsonl --retain physics=physics.jsonl chat=chat.jsonl news=news.txt \\\n"
    "    --out guardrails/chemistry\n"
    '  saeguard fit --about "planets, stars and space" --retain physics=physics.jsonl chat=chat.jsonl \\\n'
    "    --out guardrails/space --n 20"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fit`."""
    add_model(parser)
    parser.add_argument("--sae", metavar="S", help="SAE folder or hub id (default: the embedded one)")
    parser.add_argument("--layer", type=int, metavar="L", help="guarded layer, from 0 (default: the SAE's own)")
    parser.add_argument(
        "--forget",
        metavar="FILE",
        help=".txt, .jsonl[.gz], .parquet or hf:DATASET[:CONFIG]:SPLIT:COLUMN; optional where features are given",
    )
    parser.add_argument(
        "--retain",
        required=True,
        nargs="+",
        action="extend",
        metavar="NAME=FILE",
        help="named texts that must stay untouched; give several, near neighbours of the topic among them",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the guardrail")
    parser.add_argument(
        "--work", metavar="DIR", help="folder for finished shards (default: DIR.work); a killed run resumes there"
    )
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True,
                        help="use finished shards of an earlier run (default: yes)")  # fmt: skip
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="default", help="paper: as the authors' code computes it"
    )
    _add_given(parser)
    add_common(parser)
    add_fields(parser, FitConfig, skip=("seed",))


def _add_given(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("features given, not selected")
    group.add_argument("--features", metavar="IDS", help="their ids, as in 12,34,56")
    group.add_argument("--about", metavar="WORDS", help="those whose explanation is about this: the best n are shown, "
                       "and used after confirmation")  # fmt: skip
    group.add_argument("--explanations", metavar="FILE", help="from Neuronpedia, from saeguard explain, or a table of "
                       "feature and description (default: those of the embedded SAE)")  # fmt: skip
    group.add_argument("--all-words", action="store_true", help="an explanation must have all the words, not one")
    group.add_argument("--semantic", metavar="MODEL", help="search by meaning, with this sentence-embedding model")
    group.add_argument("--yes", action="store_true", help="use what was found without asking")


def run(args: argparse.Namespace) -> None:
    """Fit, save, and say how good it is."""
    import shutil
    from dataclasses import replace
    from pathlib import Path

    from saeguard import fit
    from saeguard.cli.given import given_features
    from saeguard.cli.loading import load
    from saeguard.report.overlap import overlaps
    from saeguard.report.terminal import print_report

    config = fit_config(args)
    retain = named_files(args.retain)
    work = Path(args.work or f"{args.out}.work")
    if not args.resume:
        shutil.rmtree(work, ignore_errors=True)
    _check_use(args)
    loaded = load(args)
    sae, layer = loaded.sae_and_layer(args.sae, args.layer)
    config = replace(config, given=given_features(args, sae, layer, loaded))
    guardrail = fit(
        loaded.model, loaded.tokenizer, sae, layer=layer, forget=args.forget, retain=retain,
        config=config, work_dir=work, show_progress=True,
    )  # fmt: skip
    folder = guardrail.save_pretrained(args.out)
    if args.json:
        emit(_summary(str(folder), guardrail) | {"overlaps": overlaps(guardrail.rule)})
        return
    print_report(guardrail, console())
    console().print(f"\nSaved to {folder}. Next: saeguard inspect {folder} --page page.html")


def _summary(folder: str, guardrail: Any) -> dict[str, Any]:
    chosen = guardrail.evidence["gates"][guardrail.evidence["chosen"]]
    keys = ("gate", "threshold", "caught", "false_positives", "auroc")
    matches = {} if guardrail.evidence["given"] is None else {"given": guardrail.evidence["given"]}
    return {"artifact": folder, "features": list(guardrail.features), **{key: chosen[key] for key in keys}, **matches}


def _check_use(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other before anything is loaded. Raises `UsageError`."""
    if args.features and args.about:
        raise UsageError("--features and --about both say which features: give one of them")
    if args.about is None and (args.explanations or args.semantic or args.all_words):
        raise UsageError("--explanations, --semantic and --all-words need --about: what should the features be about?")
    if not (args.forget or args.features or args.about):
        raise UsageError("what should be forgotten? Expected --forget FILE, --about WORDS or --features IDS")
