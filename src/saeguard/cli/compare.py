"""`saeguard compare`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from saeguard.attacks.config import AttackConfig
from saeguard.baselines.catalogue import BASELINES
from saeguard.cli.judging import add_report, add_sources, show, sources
from saeguard.cli.options import add_common, add_fields, add_model, console, value_of
from saeguard.cli.texts import add_texts, fit_texts
from saeguard.errors import UsageError

if TYPE_CHECKING:
    from saeguard.baselines.catalogue import Baseline, Cost, Trial
    from saeguard.evaluation.survival import Relearn
    from saeguard.evaluation.task import Task

HELP = "several methods with equal tuning budgets: one table and one frontier"
EXAMPLE = "saeguard compare --methods dsg evidence probe static prompt-refuse --out compare.json --page compare.html"
ALL = "all"
RELEARNED = ("documents", "learning_rate", "batch", "max_tokens")
"""Settings of `attack` that `--relearn` goes by."""
DEFAULT = [name for name, one in BASELINES.items() if not one.trains_weights]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `compare`."""
    parser.add_argument("--methods", nargs="+", choices=[*BASELINES, ALL], default=DEFAULT, metavar="NAME",
                        help="methods to compare, as `saeguard baseline list` names them, or all "
                        "(default: those that change no weights)")  # fmt: skip
    parser.add_argument("--budget", type=int, default=8, metavar="N",
                        help="configurations that each method may try (default: 8)")  # fmt: skip
    parser.add_argument("--grid", choices=("small", "paper"), default="small",
                        help="values tried of methods that train (default: small)")  # fmt: skip
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="[METHOD.]NAME=VALUE[,VALUE]",
                        help="values tried of a setting in place of the grid's, of each method that has it or of one: "
                        "steps=10 npo.learning-rate=1e-4,3e-4")  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=0.01, metavar="X",
                        help="accuracy off the topic that a setting may cost (default: 0.01)")  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="at most this many questions of each domain")
    parser.add_argument("--costs", action=argparse.BooleanOptionalAction, default=True,
                        help="measure what fitting and running each chosen one takes (default: yes)")  # fmt: skip
    parser.add_argument("--relearn", type=int, metavar="EPOCHS", help="train each chosen one's model further on forget "
                        "text, and ask about the topic again (default: no)")  # fmt: skip
    add_fields(parser, AttackConfig, skip=[name for name in vars(AttackConfig()) if name not in RELEARNED])
    add_model(parser)
    parser.add_argument("--sae", metavar="S", help="SAE folder or hub id (default: the embedded one)")
    parser.add_argument("--layer", type=int, metavar="L", help="guarded layer, from 0 (default: the SAE's own)")
    parser.add_argument("--force", action="store_true", help="go on although the SAE does not fit (see doctor)")
    add_texts(parser)
    add_sources(parser)
    parser.add_argument("--tofu", metavar="DIR", help="instead of questions: folder with TOFU's four *_perturbed.jsonl "
                        "files, to choose on their dev side and report on their test side")  # fmt: skip
    parser.add_argument("--never-taught", metavar="FILE", help="--tofu: result of a model that was never taught the "
                        "forget set, for forget quality")  # fmt: skip
    parser.add_argument("--out", default="compare.json", metavar="FILE", help="the result (default: compare.json)")
    parser.add_argument("--work", metavar="DIR", help="where finished work is kept (default: as OUT, ending in .work); "
                        "a killed comparison resumes there")  # fmt: skip
    add_report(parser)
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Compare, write the result, show it. Raises `UsageError`."""
    from pathlib import Path

    from saeguard.evaluation.comparison import Comparison, Measure
    from saeguard.evaluation.harness import Settings
    from saeguard.evaluation.result import write_result
    from saeguard.evaluation.subject import Loader

    if args.budget < 1:
        raise UsageError(f"--budget {args.budget}: each method needs at least one configuration")
    methods = methods_of(args)
    work = Path(args.work or Path(args.out).with_suffix(".work"))
    tuning, tasks = _tasks(args)
    trial = _trial(args, methods, work)
    measure: Measure | None = (lambda *one: _measured(args, trial.layer, *one)) if args.costs else None
    relearn = _relearn(args, trial.forget, work)
    comparison = Comparison(Loader(trial.load), trial, methods, args.budget, tuning, tasks, measure, work, relearn)
    result = comparison.run(Settings(limit=args.limit, seed=args.seed), args.tolerance)
    write_result(result, args.out)
    show(result, args)
    if not args.json:
        console().print(f"\nResult: {args.out}. Draw it again: saeguard eval --render {args.out} --page page.html")


def methods_of(args: argparse.Namespace) -> list[Baseline]:
    """The methods with the values that are tried. Raises `UsageError`."""
    from dataclasses import fields, replace

    from saeguard.baselines.grids import with_grid

    given = [_given(pair) for pair in args.set]
    methods, used = [], set()
    for one in (with_grid(BASELINES[name], args.grid) for name in names_of(args)):
        names, grid = {field.name for field in fields(one.settings)}, dict(one.grid)
        for method, name, words in given:
            if method in ("", one.name) and name in names:
                grid[name] = [value_of(one.settings, name, word) for word in words]
                used.add((method, name))
        methods.append(replace(one, grid=grid))
    for method, name, _ in given:
        if (method, name) not in used:
            raise UsageError(f"--set {name}: none of the methods has it (see `saeguard baseline NAME -h`)")
    return methods


def names_of(args: argparse.Namespace) -> list[str]:
    """Each once."""
    return list(BASELINES) if ALL in args.methods else list(dict.fromkeys(args.methods))


def _given(pair: str) -> tuple[str, str, list[str]]:
    """A `--set` as method (or nothing for all), setting and values. Raises `UsageError`."""
    key, equals, values = pair.partition("=")
    if not (equals and values):
        raise UsageError(f"--set {pair}: expected [METHOD.]NAME=VALUE, or several values with commas between them")
    method, _, name = key.rpartition(".")
    return method, name.replace("-", "_"), values.split(",")


def _tasks(args: argparse.Namespace) -> tuple[list[Task], list[Task]]:
    """On what settings are chosen, and what is reported. Raises `UsageError`."""
    from dataclasses import replace
    from pathlib import Path

    from saeguard.evaluation.catalogue import make_tasks, tofu
    from saeguard.evaluation.config import EvalConfig

    if args.tofu is not None:
        if args.benchmark or args.topic or args.near or args.far:
            raise UsageError("--tofu stands in the place of questions: leave out --benchmark, --topic, --near, --far")
        task = tofu(Path(args.tofu), args.never_taught, whole=False)
        return [replace(task, max_new_tokens=1)], [task]  # accuracy, by which one chooses, is not of what is written
    found = sources(args, [])
    near = ["near"] if any(one.role == "near" for one in found.questions) else []
    tuning = ["mcq", *near]
    return make_tasks(tuning, found, EvalConfig()), make_tasks([*tuning, "open"], found, EvalConfig())


def _trial(args: argparse.Namespace, methods: list[Baseline], work: Any) -> Trial:
    """What all methods are fitted on: the same whichever they are."""
    from saeguard.baselines.catalogue import Trial
    from saeguard.cli.loading import load, sae_and_layer

    def loaded() -> tuple[Any, Any]:
        found = load(args)
        return found.model, found.tokenizer

    forget, retain = fit_texts(args)
    there = args.model is None or args.sae is not None or any("sae" in one.needs for one in methods)
    sae, layer = sae_and_layer(args.sae, args.layer, embedded=args.model is None) if there else (None, args.layer)
    return Trial(
        None, loaded, forget, retain, sae, layer, work, work, args.seed, args.force, args.model, args.device
    )  # fmt: skip


def _relearn(args: argparse.Namespace, forget: str, work: Any) -> Relearn | None:
    """How models are trained further, if they are to be. Raises `UsageError`."""
    from dataclasses import replace
    from functools import partial

    from saeguard.attacks.relearn_forget import RelearnForget

    if args.relearn is None:
        return None
    if args.relearn < 1:
        raise UsageError(f"--relearn {args.relearn}: expected a number of epochs from 1 on")
    given = {name: value for name, value in vars(args).items() if name in RELEARNED}
    config = replace(AttackConfig(seed=args.seed), **given)
    return partial(RelearnForget.of, config, args.relearn, forget, work / "relearning")


def _measured(args: argparse.Namespace, layer: int | None, baseline: Baseline, settings: Any) -> Cost:
    """Fit a method in a process and folders of its own. Raises `EvaluationError` where that fails."""
    import json
    import subprocess
    import sys
    import tempfile

    from saeguard.baselines.catalogue import Cost
    from saeguard.errors import EvaluationError

    with tempfile.TemporaryDirectory(prefix="saeguard-") as folder:
        command = [
            sys.executable,
            "-m",
            "saeguard.cli.main",
            "baseline",
            baseline.name,
            *_words(args, layer, baseline, settings),
        ]
        done = subprocess.run([*command, "--out", f"{folder}/out"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EvaluationError(f"measuring how long {baseline.name} takes to fit failed: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout)
    return Cost(found["seconds"], found["peak_memory_mb"])


def _words(args: argparse.Namespace, layer: int | None, baseline: Baseline, settings: Any) -> list[str]:
    """The options of `baseline` that say what this comparison says."""
    from saeguard.cli.options import words_of

    words = ["--json", "--seed", str(args.seed), "--device", args.device, "--dtype", args.dtype, *words_of(settings)]
    given = {"model": args.model, "layer": layer, "forget": args.forget}
    if "sae" in baseline.needs:
        given["sae"] = args.sae
    words += [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    if args.retain:
        words += ["--retain", *args.retain]
    return words + (["--force"] if args.force and "sae" in baseline.needs else [])
