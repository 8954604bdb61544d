"""The features that the options of `fit` name, or that their explanations lead to once a person has seen them."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from saeguard.choices import GivenFeatures
from saeguard.cli.options import console, emit, feature_ids, fit_config
from saeguard.errors import UsageError

if TYPE_CHECKING:
    from saeguard.cli.loading import Loaded
    from saeguard.explain.matching import Match
    from saeguard.sae.autoencoder import SparseAutoencoder


def given_features(
    args: argparse.Namespace, sae: SparseAutoencoder, layer: int, loaded: Loaded
) -> GivenFeatures | None:
    """The features of `--features` or `--about`; None where there is neither. Raises `UsageError` unless confirmed."""
    if args.features is not None:
        return GivenFeatures(feature_ids(args.features))
    if args.about is None:
        return None
    from saeguard.explain.explanations import read_explanations
    from saeguard.explain.matching import by_meaning, by_words, given
    from saeguard.model import model_fingerprint

    explanations = read_explanations(_file(args))
    explanations.check(sae, layer, model_fingerprint(loaded.model)["name"])
    if args.semantic:
        method, found = f"meaning ({args.semantic})", by_meaning(explanations.rows, args.about, args.semantic)
    else:
        method = "all words" if args.all_words else "words"
        found = by_words(explanations.rows, args.about, all_words=args.all_words)
    if not found:
        raise UsageError(f"no explanation in {explanations.source} is about {args.about!r}: try other words")
    matches = found[: fit_config(args).n]
    _show(matches, len(found), explanations, args)
    return given(matches, explanations, args.about, method)


def _file(args: argparse.Namespace) -> Any:
    from saeguard.embedded import EXPLANATIONS

    if args.explanations:
        return args.explanations
    if args.sae or args.model:
        raise UsageError("--explanations is needed: only those of the embedded SAE come with the package")
    return EXPLANATIONS


def _show(matches: list[Match], found: int, explanations: Any, args: argparse.Namespace) -> None:
    """Print what was matched, and go on only if that is right."""
    from saeguard.report.formatting import visible

    interactive = sys.stdin.isatty() and not args.json
    if args.json and not args.yes:
        emit({"matches": [vars(match) for match in matches]})
    else:
        table = Table("#", "feature", "score", "explanation", box=None, header_style="dim")
        for rank, match in enumerate(matches, 1):
            table.add_row(str(rank), str(match.feature), f"{match.score:.3f}", Text(visible(match.text)))
        out = console(quiet=args.json)
        out.print(table)
        out.print(f"{len(matches)} of {found} features that match, of {len(explanations.rows)} explanations "
                  f"({explanations.repeated} repeated and {explanations.empty} empty ones left out).")  # fmt: skip
    if args.yes:
        return
    if not interactive:
        raise UsageError("nobody is here to confirm these features: look at them, then say --yes")
    if input("Use these features? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UsageError("not confirmed: nothing was fitted")
