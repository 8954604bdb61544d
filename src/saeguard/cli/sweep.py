"""`saeguard sweep`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from saeguard.cli.judging import MANY, add_report, add_sources, show, sources
from saeguard.cli.options import add_common, add_fields, add_model, config_of, console, named_files
from saeguard.cli.texts import add_texts, fit_texts
from saeguard.config import PRESETS
from saeguard.errors import UsageError
from saeguard.evaluation.config import SweepAxes

if TYPE_CHECKING:
    from saeguard.cli.loading import Loaded
    from saeguard.evaluation.sweep import Place

HELP = "fit with many settings, choose one on dev questions, judge it on test questions"
EXAMPLE = "saeguard sweep --n 10 20 40 --strength 0.25 0.5 1 --gate probe --out guardrails/best --page sweep.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `sweep`."""
    add_model(parser)
    parser.add_argument("--at", **MANY, metavar="LAYER=SAE", help="layers and SAEs to try (default: the embedded one)")
    add_texts(parser)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default", help="the settings that are not swept")
    parser.add_argument("--name", default="forget", metavar="TEXT", help="name of the rule (default: forget)")
    parser.add_argument("--force", action="store_true", help="fit although an SAE does not fit (see doctor)")
    parser.add_argument("--tolerance", type=float, default=0.01, metavar="X",
                        help="accuracy off the topic that a setting may cost (default: 0.01)")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="at most this many questions of each domain")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the chosen guardrail")
    parser.add_argument("--work", metavar="DIR", help="where finished work is kept (default: DIR.work); a killed sweep "
                        "resumes there")  # fmt: skip
    parser.add_argument("--result", metavar="FILE", help="the result (default: DIR.json)")
    add_sources(parser)
    add_report(parser)
    add_common(parser)
    add_fields(parser, SweepAxes)


def run(args: argparse.Namespace) -> None:
    """Sweep, save the chosen guardrail and the result, show it."""
    from dataclasses import replace
    from pathlib import Path

    from saeguard.cli.loading import load
    from saeguard.evaluation.catalogue import make_tasks
    from saeguard.evaluation.config import EvalConfig
    from saeguard.evaluation.harness import Settings
    from saeguard.evaluation.result import write_result
    from saeguard.evaluation.subject import Loader
    from saeguard.evaluation.sweep import Sweep, Texts

    axes: dict[str, Any] = {name: values for name, values in vars(config_of(SweepAxes, args)).items() if values}
    if not axes and len(args.at) < 2:
        raise UsageError("nothing to sweep: give a setting several values, for example --n 10 20 40")
    loaded = load(args)
    places, texts = _places(args, loaded), Texts(*fit_texts(args))
    if len(places) > 1:
        axes["at"] = [place.name for place in places]
    base = replace(PRESETS[args.preset], name=args.name, seed=args.seed, force=args.force)
    found = sources(args, [])
    names = ["mcq", "near"] if any(one.role == "near" for one in found.questions) else ["mcq"]
    tasks = make_tasks(names, found, EvalConfig())
    loader = Loader(lambda: (loaded.model, loaded.tokenizer))
    sweep = Sweep(loader, places, texts, base, axes, tasks, Path(args.work or f"{args.out}.work"))
    guardrail, result = sweep.run(Settings(limit=args.limit, seed=args.seed), args.tolerance)
    guardrail.save_pretrained(args.out)
    write_result(result, args.result or f"{args.out}.json")
    show(result, args)
    if not args.json:
        console().print(f"\nThe chosen guardrail: {args.out}. Result: {args.result or f'{args.out}.json'}")


def _places(args: argparse.Namespace, loaded: Loaded) -> list[Place]:
    from saeguard.evaluation.sweep import Place

    if not args.at:
        sae, layer = loaded.sae_and_layer(None, None)
        return [Place("default", layer, sae)]
    found = []
    for layer_text, source in named_files(args.at, "--at").items():
        if not layer_text.isdigit():
            raise UsageError(f"--at {layer_text}={source}: expected LAYER=SAE, the layer as a number")
        sae, layer = loaded.sae_and_layer(source, int(layer_text))
        found.append(Place(f"{layer}={source}", layer, sae))
    return found
