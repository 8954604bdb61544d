"""`saeguard train-sae`."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard.cli.options import add_common, add_fields, add_model, console, emit, named_files
from saeguard.config import SAETraining

HELP = "train an SAE for a model that has none"
EXAMPLE = "saeguard train-sae --layer 6 --text wiki=wiki.jsonl.gz books=books.txt chat=chat.jsonl --out my-sae"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `train-sae`."""
    add_model(parser)
    parser.add_argument(
        "--layer", type=int, required=True, metavar="L", help="layer whose residual stream is encoded, from 0"
    )
    parser.add_argument(
        "--text",
        required=True,
        nargs="+",
        action="extend",
        metavar="NAME=FILE",
        help="varied text; each file gives an equal share",
    )
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, metavar="N", help="tokens of text read (default: 1000000)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the SAE, in SAELens format")
    parser.add_argument("--work", metavar="DIR", help="folder for residual streams and checkpoints (default: DIR.work)")
    add_common(parser)
    add_fields(parser, SAETraining, skip=("seed",))


def run(args: argparse.Namespace) -> None:
    """Read, train, measure, save with a card."""
    import dataclasses
    from pathlib import Path

    from saeguard.cli.loading import load
    from saeguard.corpus import Corpus
    from saeguard.sae.autoencoder import SparseAutoencoder
    from saeguard.sae.card import sae_card
    from saeguard.sae.formats.saelens import save_saelens
    from saeguard.sae.quality import measure
    from saeguard.sae.residuals import training_windows

    files = named_files(args.text)
    corpora = [Corpus.of(name, "retain", file) for name, file in files.items()]
    names = {field.name for field in dataclasses.fields(SAETraining)}
    config = SAETraining(**{name: value for name, value in vars(args).items() if name in names})
    loaded, out = load(args), Path(args.out)
    sae = _train(args, loaded, corpora, config, Path(args.work or f"{args.out}.work"))
    save_saelens(sae, out)
    held_out = training_windows(loaded.tokenizer, corpora, min(15_000, args.tokens // 10), split="test")
    quality = measure(loaded.model, loaded.tokenizer, SparseAutoencoder.load(out), args.layer, held_out)
    (out / "README.md").write_text(sae_card(sae, config, quality, sorted(files), args.tokens), "utf-8")
    if args.json:
        emit({"sae": str(out), "fingerprint": SparseAutoencoder.load(out).fingerprint(), **quality.as_dict()})
    else:
        console().print("\n".join(f"{name:20} {value:,.4g}" for name, value in quality.as_dict().items()))
        console().print(f"Saved to {out}")


def _train(args: argparse.Namespace, loaded: Any, corpora: Any, config: SAETraining, work: Any) -> Any:
    from saeguard.model import input_device, model_fingerprint
    from saeguard.progress import progress
    from saeguard.sae.residuals import collect_residuals, training_windows, windows_digest
    from saeguard.sae.train import train

    work.mkdir(parents=True, exist_ok=True)
    windows = training_windows(loaded.tokenizer, corpora, args.tokens)
    name = f"layer{args.layer}-{model_fingerprint(loaded.model)['weights']}-{windows_digest(windows)}"
    residuals = collect_residuals(loaded.model, loaded.tokenizer, args.layer, windows, work / f"{name}.bin")
    metadata = {
        "model_name": loaded.model.config._name_or_path,
        "hook_name": f"blocks.{args.layer}.hook_resid_post",
        "layer": args.layer,
    }
    with progress("training", config.token_passes, unit="tokens") as advance:
        return train(
            residuals,
            config,
            on_step=advance,
            metadata=metadata,
            device=input_device(loaded.model),
            checkpoint=work / f"{name}-{config.digest()}.safetensors",
        )
