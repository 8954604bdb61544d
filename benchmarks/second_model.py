"""The starter topic on a model other than the embedded one, and what the unit of the clamp does there.

    python benchmarks/second_model.py MODEL SAE [--strengths 0.25 0.5 1 2] [--c 100 500] [--guardrail DIR]

Fits with the settings of quickstart, or takes the guardrail of `--guardrail`, and prints in Markdown: what the gates
catch on held-out text, the questions without and with the guardrail, and the topic's questions again under other
clamps. The clamp acts after the layer that the gate reads, so every clamp has the same triggers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from saeguard import Guardrail, SparseAutoencoder, fit
from saeguard.clamp import Clamp
from saeguard.config import PRESETS
from saeguard.embedded import TOPIC, StarterSet, starter_set
from saeguard.evaluation.mcq import accuracy, answer_questions
from saeguard.model import load_model
from saeguard.quickstart import ALPHA, GATE, STRENGTH, judge


def main() -> None:
    """Fit, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("sae", help="an SAE on a residual stream of it")
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.25, STRENGTH, 1.0, 2.0])
    parser.add_argument("--c", type=float, nargs="*", default=[500.0], help="absolute clamps, as the paper's 500")
    parser.add_argument("--guardrail", type=Path, help="use this one instead of fitting")
    parser.add_argument("--out", type=Path, default=Path("guardrails/second-model"))
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype=args.dtype)
    sae, starter = SparseAutoencoder.load(args.sae), starter_set()
    guardrail = Guardrail.from_pretrained(args.guardrail) if args.guardrail else fit_topic(model, tokenizer, sae, args)
    print_gates(guardrail)
    print_questions(model, tokenizer, guardrail, starter)
    norm = guardrail.evidence["median_residual_norm"]
    clamps = [s * norm for s in args.strengths] + args.c
    print_clamps(model, tokenizer, [with_clamp(guardrail, c, c / norm) for c in clamps], starter)


def fit_topic(model: Any, tokenizer: Any, sae: SparseAutoencoder, args: argparse.Namespace) -> Guardrail:
    """The guardrail of the starter topic, as quickstart fits it, kept in `--out`."""
    starter = starter_set()
    config = replace(PRESETS["default"], name=TOPIC, alpha=ALPHA, gate=GATE, strength=STRENGTH)
    guardrail = fit(
        model, tokenizer, sae, layer=sae.layer or 0, forget=starter.forget, retain=starter.retain, config=config,
        work_dir=args.out.with_name(f"{args.out.name}.work"), show_progress=True,
    )  # fmt: skip
    guardrail.save_pretrained(args.out)
    return guardrail


def with_clamp(guardrail: Guardrail, c: float, strength: float) -> Guardrail:
    """The same guardrail with another clamp value."""
    clamp = Clamp(guardrail.clamp.kind, c, strength)
    return replace(guardrail, rules=(replace(guardrail.rule, clamp=clamp),))


def print_gates(guardrail: Guardrail) -> None:
    """What each gate catches of held-out topic text, and the retain domain it troubles most."""
    rows = []
    for name, gate in guardrail.evidence["gates"].items():
        worst = max(gate["false_positives"].items(), key=lambda pair: pair[1]["rate"])
        caught, troubled = f"{gate['caught']['rate']:.2f}", f"{worst[1]['rate']:.3f} ({worst[0]})"
        rows.append([name, caught, f"{gate['auroc']:.3f}", troubled])
    print_table(["gate", "topic caught", "AUROC", "worst domain"], rows)


def print_questions(model: Any, tokenizer: Any, guardrail: Guardrail, starter: StarterSet) -> None:
    """The table of quickstart."""
    rows = [result.as_dict() for result in judge(model, tokenizer, guardrail, starter.questions)]
    print_table(
        ["questions", "role", "n", "unguarded", "guarded", "triggered"],
        [
            [row["name"], row["role"], row["n"], f"{row['unguarded']:.3f}", interval(row, "guarded"),
             f"{row['trigger_rate']:.3f}"]
            for row in rows
        ],
    )  # fmt: skip


def print_clamps(model: Any, tokenizer: Any, guardrails: Sequence[Guardrail], starter: StarterSet) -> None:
    """Accuracy on the topic's questions under each clamp."""
    rows = []
    for guardrail in guardrails:
        answers = answer_questions(model, tokenizer, starter.questions[TOPIC], guardrail)
        rate = accuracy(answers)
        low, high = rate.interval
        clamp = guardrail.clamp
        rows.append([f"{clamp.c:,.0f}", f"{clamp.strength:.3g}", f"{rate.value:.3f} ({low:.2f}-{high:.2f})"])
    print_table(["c", "in residual norms", f"{TOPIC}, guarded"], rows)


def interval(row: dict[str, Any], key: str) -> str:
    """A rate with its interval."""
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.3f} ({low:.2f}-{high:.2f})"


def print_table(heads: Iterable[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table."""
    heads = list(heads)
    for row in [heads, ["---"] * len(heads), *rows]:
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    print()


if __name__ == "__main__":
    main()
