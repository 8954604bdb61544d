"""`saeguard doctor`."""

from __future__ import annotations

import argparse

from saeguard.cli.options import add_common, add_model, console, emit, named_files

HELP = "does this SAE belong to this model and layer?"
EXAMPLE = "saeguard doctor --model M --sae S --layer L --text wiki=wiki.jsonl chat=chat.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `doctor`."""
    add_model(parser)
    parser.add_argument("--sae", metavar="S", help="SAE folder or hub id (default: the embedded one)")
    parser.add_argument("--layer", type=int, metavar="L", help="layer to examine, from 0 (default: the SAE's own)")
    parser.add_argument(
        "--text", nargs="+", action="extend", default=[], metavar="NAME=FILE",
        help="texts to examine it on (default: those of the starter set)",
    )  # fmt: skip
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of text (default: 4000)")
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Examine, print; exit status 1 where the SAE does not fit."""
    from saeguard.cli.loading import load
    from saeguard.corpus import Corpus
    from saeguard.doctor.diagnosis import TOKENS, diagnose
    from saeguard.doctor.reading import Subject
    from saeguard.embedded import TOPIC, starter_set
    from saeguard.report.doctor import print_diagnosis

    starter = starter_set()
    texts = {TOPIC: starter.forget, **starter.retain}
    files = named_files(args.text) or {name: str(file) for name, file in texts.items()}
    corpora = [Corpus.of(name, "retain", file) for name, file in files.items()]
    loaded = load(args)
    sae, layer = loaded.sae_and_layer(args.sae, args.layer)
    subject = Subject(loaded.model, loaded.tokenizer, sae, layer)
    with console(quiet=True).status("Examining …"):
        diagnosis = diagnose(subject, corpora, tokens=args.tokens or TOKENS)
    if args.json:
        emit({"layer": layer, "sae": sae.source, **diagnosis.as_dict()})
    else:
        print_diagnosis(diagnosis, subject, console())
    return int(diagnosis.mismatch is not None)
