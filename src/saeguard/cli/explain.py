"""`saeguard explain`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from saeguard.cli.options import add_common, add_model, console, emit, feature_ids, named_files
from saeguard.errors import UsageError

HELP = "what every feature of an SAE is active at, as a file that fit can search"
EXAMPLE = (
    "saeguard explain --text wiki=wiki.jsonl.gz books=books.txt --out explanations.jsonl.gz\n"
    "  saeguard explain --text wiki=wiki.jsonl.gz books=books.txt --out explanations.jsonl.gz \\\n"
    "    --describe-with http://localhost:8000/v1 --describe-model NAME --limit 500"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `explain`."""
    add_model(parser)
    parser.add_argument("--sae", metavar="S", help="SAE folder or hub id (default: the embedded one)")
    parser.add_argument("--layer", type=int, metavar="L", help="layer of the SAE, from 0 (default: the SAE's own)")
    parser.add_argument("--text", required=True, nargs="+", action="extend", metavar="NAME=FILE",
                        help="varied text; the documents that fit would fit on are read")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FILE", help="the explanations, .jsonl or .jsonl.gz")
    parser.add_argument("--work", metavar="DIR", help="folder for what was read (default: FILE.work); a killed run "
                        "resumes there")  # fmt: skip
    parser.add_argument("--peaks", type=int, default=20, metavar="N",
                        help="windows kept of each feature, from which its words are taken (default: 20)")  # fmt: skip
    parser.add_argument("--contexts", type=int, default=5, metavar="N",
                        help="of these, how many are written (default: 5)")  # fmt: skip
    parser.add_argument("--describe-with", metavar="URL", help="OpenAI-compatible endpoint, up to /v1, to be asked for "
                        "a description of each feature")  # fmt: skip
    parser.add_argument("--describe-model", metavar="NAME", help="name of the model there")
    parser.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the key of the endpoint")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="questions at a time (default: 8)")
    parser.add_argument("--features", metavar="IDS", help="ask about these alone, as in 12,34,56")
    parser.add_argument("--limit", type=int, metavar="N", help="ask about this many at most, those of highest rate")
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Read, describe, write."""
    from pathlib import Path

    from saeguard.explain.explaining import write_rows

    if bool(args.describe_with) != bool(args.describe_model):
        raise UsageError("--describe-with URL and --describe-model NAME belong together")
    if min(args.peaks, args.contexts, args.concurrency) < 1:
        raise UsageError("--peaks, --contexts and --concurrency are at least 1")
    api_key = _api_key(args.api_key_env)
    wanted = None if args.features is None else feature_ids(args.features)
    work = Path(args.work or f"{args.out}.work")
    rows = _rows(args, work)
    if args.describe_with:
        _describe(args, rows, wanted, api_key, work / "descriptions.jsonl")
    write_rows(rows, Path(args.out))
    found = {"out": args.out, "features": len(rows), "described": sum(row["by"] == args.describe_model for row in rows)}
    if args.json:
        emit(found)
    else:
        console().print(
            f"Wrote {args.out}: {len(rows)} features that were active.\n"
            f'Next: saeguard fit --explanations {args.out} --about "a topic in words" --retain … --out …'
        )


def _rows(args: argparse.Namespace, work: Any) -> list[dict[str, Any]]:
    from saeguard.cli.loading import load
    from saeguard.compatibility import check_fits
    from saeguard.corpus import Corpus
    from saeguard.explain.explaining import explanation_rows, read_peaks
    from saeguard.model import model_fingerprint
    from saeguard.progress import progress
    from saeguard.shards import Pass, estimated_tokens, pass_fingerprint
    from saeguard.windows import Windower

    corpora = {name: Corpus.of(name, "retain", file) for name, file in named_files(args.text).items()}
    summaries = {name: corpus.summary() for name, corpus in corpora.items()}
    loaded = load(args)
    sae, layer = loaded.sae_and_layer(args.sae, args.layer)
    check_fits(loaded.model, sae, layer)
    task = Pass(loaded.model, loaded.tokenizer, sae, layer, Windower(loaded.tokenizer), sample=args.peaks)
    folder = work / pass_fingerprint(task, model_fingerprint(loaded.model), summaries)
    with progress("reading", estimated_tokens(summaries.values()), unit="tokens") as advance:
        peaks = read_peaks(task, corpora, folder, k=args.peaks, advance=advance)
    return list(explanation_rows(task, peaks, list(corpora), contexts=args.contexts))


def _describe(
    args: argparse.Namespace, rows: list[dict[str, Any]], wanted: Sequence[int] | None, api_key: str | None, kept: Any
) -> None:
    """Put the endpoint's descriptions into the rows that were asked about."""
    from saeguard.explain.describing import Endpoint, described
    from saeguard.progress import progress

    endpoint = Endpoint(args.describe_with, args.describe_model, api_key, args.concurrency)
    if missing := set(wanted or ()) - {row["feature"] for row in rows}:
        raise UsageError(f"--features: {sorted(missing)[:8]} were never active in this text")
    asked = [row for row in rows if wanted is None or row["feature"] in wanted]
    asked = sorted(asked, key=lambda row: -row["firing_rate"])[: args.limit]
    with progress("describing", len(asked), unit="features") as advance:
        texts = described(asked, endpoint, kept, advance)
    for row in asked:
        row |= {"description": texts[row["feature"]], "by": args.describe_model}


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise UsageError(f"--api-key-env {variable}: that environment variable is not set")
    return key
