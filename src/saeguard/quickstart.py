"""The whole story on the embedded default: fit a guardrail against one topic, judge it, show it.

Questions that judge are never used to fit or calibrate; rates on text are of its held-out split.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saeguard.choices import GateChoice
from saeguard.config import PRESETS, FitConfig
from saeguard.embedded import LAYER, TOPIC, StarterSet, embedded_sae, starter_set
from saeguard.evaluation.mcq import Answer, Question, accuracy, answer_questions, trigger_rate
from saeguard.fitting import fit
from saeguard.generate import Generation, answer
from saeguard.guardrail import Guardrail
from saeguard.progress import progress

ALPHA = 0.05
GATE: GateChoice = "probe"
"""Catches most and spares the near neighbours best on the starter set (all gates: docs/results/quickstart.md)."""
STRENGTH = 0.5
"""Half a residual norm forgets as well as more (docs/results/second-model.md), and disturbs the text less."""
EXAMPLES = (
    "Which planet is known for its rings, and what are they made of?",
    "Why does a ball thrown into the air fall back down?",
    "How do I boil an egg so that the yolk stays soft?",
)


@dataclass(frozen=True)
class SetResult:
    """One question set, answered without and with the guardrail."""

    name: str
    role: str
    unguarded: list[Answer]
    guarded: list[Answer]

    def as_dict(self) -> dict[str, Any]:
        """The figures by name; intervals are Wilson's at 95 %."""
        plain, guarded, triggered = accuracy(self.unguarded), accuracy(self.guarded), trigger_rate(self.guarded)
        return {
            "name": self.name, "role": self.role, "n": plain.n,
            "unguarded": plain.value, "guarded": guarded.value, "trigger_rate": triggered.value,
            "unguarded_interval": plain.interval, "guarded_interval": guarded.interval,
            "trigger_interval": triggered.interval,
        }  # fmt: skip


def run(model: Any, tokenizer: Any, out: Path, *, config: FitConfig | None = None, started: float) -> dict[str, Any]:
    """Fit on the starter set, save to `out`, judge; the object that `quickstart --json` prints, with examples."""
    starter = starter_set()
    guardrail = fit_starter(model, tokenizer, starter, out.with_name(f"{out.name}.work"), config)
    guardrail.save_pretrained(out)
    sets = judge(model, tokenizer, guardrail, starter.questions)
    chosen = guardrail.evidence["gates"][guardrail.evidence["chosen"]]
    return {
        "sets": [result.as_dict() for result in sets],
        "false_positives": {name: row["rate"] for name, row in chosen["false_positives"].items()},
        "caught": chosen["caught"]["rate"],
        "alpha": ALPHA,
        "threshold": guardrail.threshold,
        "examples": [_example(model, tokenizer, guardrail, prompt) for prompt in EXAMPLES],
        "seconds": time.perf_counter() - started,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "artifact": str(out),
    }


def fit_starter(
    model: Any, tokenizer: Any, starter: StarterSet, work: Path, config: FitConfig | None = None
) -> Guardrail:
    """The guardrail of the starter set's topic."""
    config = config or replace(PRESETS["default"], name=TOPIC, alpha=ALPHA, gate=GATE, strength=STRENGTH)
    return fit(
        model, tokenizer, embedded_sae(), layer=LAYER, forget=starter.forget, retain=starter.retain,
        config=config, work_dir=work, show_progress=True,
    )  # fmt: skip


def judge(model: Any, tokenizer: Any, guardrail: Guardrail, questions: dict[str, list[Question]]) -> list[SetResult]:
    """Answer every question set without and with the guardrail."""
    total = 2 * sum(map(len, questions.values()))
    results = []
    with progress("answering", total, unit="questions") as advance:
        for name, its in questions.items():
            plain = answer_questions(model, tokenizer, its, advance=advance)
            guarded = answer_questions(model, tokenizer, its, guardrail, advance=advance)
            results.append(SetResult(name, StarterSet.role(name), plain, guarded))
    return results


def _example(model: Any, tokenizer: Any, guardrail: Guardrail, prompt: str) -> dict[str, Any]:
    how = Generation(max_new_tokens=40)
    guarded = answer(model, tokenizer, prompt, guardrail, how)
    return {
        "prompt": prompt,
        "unguarded": answer(model, tokenizer, prompt, None, how).text,
        "guarded": guarded.text,
        "triggered": guarded.verdict is not None and guarded.verdict.triggered,
    }
