"""Do features chosen by an L1 penalty forget as well when clamped? The procedure of quickstart.

    python benchmarks/chosen_clamp.py [--work DIR] [--limit N] [--unscaled]

What selection takes, and what the penalty leaves (chosen_l1.py, `chosen_features.py`), each given to a fit of its own
on the starter set, with the gate of quickstart, which looks at no feature and triggers alike for all, and with
evidence. Printed in Markdown: held-out passages, questions, open answers and perplexity of held-out text.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from chosen_l1 import Activity, chosen
from second_model import print_table
from several_saes import OPEN, TEXTS, UNGUARDED, perplexity, rate
from several_ways import CONFIG

from saeguard.choices import GateChoice, GivenFeatures
from saeguard.doctor.reading import Subject as Read
from saeguard.embedded import LAYER, NEAR, TOPIC, embedded_model, embedded_sae, starter_set
from saeguard.evaluation.catalogue import named_benchmark
from saeguard.evaluation.harness import Settings, evaluate
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.task import Record
from saeguard.evaluation.tasks.multiple_choice import MultipleChoice
from saeguard.evaluation.tasks.open import OpenAnswers
from saeguard.evaluation.tasks.perplexity import Perplexity
from saeguard.fitting import decide
from saeguard.guardrail import Guardrail
from saeguard.material import gather
from saeguard.sample import FORGET

SIZES = (40, 20)
RATIO = "ratio"
GATES: tuple[GateChoice, ...] = ("probe", "evidence")


def guardrails(model: Any, tokenizer: Any, work: Path, *, scaled: bool) -> dict[str, Guardrail]:
    """One for each gate and set of features, by name."""
    starter, its = starter_set(), Read(model, tokenizer, embedded_sae(), LAYER)
    found = {}
    with gather(its, starter.forget, starter.retain, CONFIG, work / "shards", show_progress=True) as material:
        first = decide(material, CONFIG)
        listed = first.evidence["contamination"]["listed"]
        left_out = {(row["corpus"], row["document"]) for row in listed if row["outlier"]}
        activity = Activity.of(its.sae, material.every_shard).without(left_out)
        for n in SIZES:
            sets: dict[str, GivenFeatures | None] = {f"{RATIO}, {n}": None}
            for name, positive in (("L1", False), ("L1, for it", True)):
                weights = chosen(activity, FORGET, n, positive=positive, scaled=scaled)
                spoken = sum(weight > 0 for weight in weights.values())
                print(f"{name}, {n}: {spoken} for the topic: {','.join(map(str, weights))}", flush=True)
                sets[f"{name}, {n}"] = GivenFeatures(tuple(weights))
            for gate in GATES:
                for name, given in sets.items():
                    config = replace(CONFIG, gate=gate, n=n, given=given)
                    found[f"{gate}, {name}"] = decide(material, config)
    return found


def print_passages(every: Mapping[str, Guardrail]) -> None:
    """Held-out passages that trigger."""
    rows = []
    for name, guardrail in every.items():
        gate = guardrail.evidence["gates"][guardrail.gate.kind]
        worst, rate_ = max(gate["false_positives"].items(), key=lambda pair: pair[1]["rate"])
        clamped = int(guardrail.gate.clamped(len(guardrail.features)).sum())
        rows.append([name, clamped, f"{gate['caught']['rate']:.3f}", f"{rate_['rate']:.3f} ({worst})"])
    print_table(["gate and features", "clamped", "topic caught", "worst corpus"], rows)


def print_questions(records: Mapping[str, Sequence[Record]]) -> None:
    """Accuracy and triggers; and beside selection's features, with the same gate and n, how many questions on the topic
    are right with these alone (+), and with selection's alone (-)."""
    far = {record.domain for record in records[UNGUARDED]} - {TOPIC, *NEAR}
    rows = []
    for name, its in records.items():
        cells = [name]
        for domains in ({TOPIC}, *({domain} for domain in NEAR), far):
            some = [record for record in its if record.domain in domains]
            right = rate(record.scores["accuracy"] for record in some)
            triggered = "" if name == UNGUARDED else f", {100 * rate(r.triggered for r in some).value:.0f} %"
            low, high = right.interval
            cells.append(f"{right.value:.3f} ({low:.2f} to {high:.2f}){triggered}")
        rows.append([*cells, "" if name == UNGUARDED else _against(its, records[_same_with_ratio(name)])])
    print_table(["accuracy, triggered", TOPIC, *NEAR, "far", "paired"], rows)


def _same_with_ratio(name: str) -> str:
    gate, *_, n = name.split(", ")
    return f"{gate}, {RATIO}, {n}"


def _against(its: Sequence[Record], others: Sequence[Record]) -> str:
    pairs = [
        (bool(a.scores["accuracy"]), bool(b.scores["accuracy"]))
        for a, b in zip(its, others, strict=True)
        if a.domain == TOPIC
    ]
    return f"+{sum(a and not b for a, b in pairs)} -{sum(b and not a for a, b in pairs)}"


def print_texts(open_: Mapping[str, Sequence[Record]], read: Mapping[str, Sequence[Record]]) -> None:
    """What open answers hold, and the perplexity of held-out text."""
    rows = []
    for name, its in open_.items():
        figures = [f"{rate(r.scores[key] for r in its).value:.2f}" for key in ("match", "gibberish")]
        own, near = ([r for r in read[name] if (r.domain == TOPIC) == of_topic] for of_topic in (True, False))
        rows.append([name, *figures, f"{perplexity(own):,.0f}", f"{perplexity(near):,.1f}"])
    print_table(["gate and features", "open answers: match", "gibberish", "perplexity, topic", "near"], rows)


def main() -> None:
    """Choose, fit, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("chosen.work"))
    parser.add_argument("--limit", type=int, help="at most this many questions and texts of each domain")
    parser.add_argument("--unscaled", action="store_true", help="as in chosen_features.py")
    args = parser.parse_args()
    model, tokenizer = embedded_model(device="cpu")
    every = guardrails(model, tokenizer, args.work, scaled=not args.unscaled)
    print_passages(every)
    loader = Loader(lambda: (model, tokenizer))
    subjects = [Subject(UNGUARDED, loader), *(Subject.guarded(name, loader, its) for name, its in every.items())]
    questions, texts = named_benchmark("starter", None)
    (asked,) = evaluate(subjects, [MultipleChoice(questions)], Settings("all", args.limit), work=args.work)
    print_questions(asked.records)
    some = tuple(each for each in texts if each.name in (TOPIC, *NEAR))
    topic = tuple(each for each in questions if each.name == TOPIC)
    (answered,) = evaluate(subjects, [OpenAnswers(topic)], Settings(limit=args.limit or OPEN), work=args.work)
    reading = Perplexity(some, frozenset(each.name for each in some))
    (read,) = evaluate(subjects, [reading], Settings("all", args.limit or TEXTS), work=args.work)
    print_texts(answered.records, read.records)


if __name__ == "__main__":
    main()
