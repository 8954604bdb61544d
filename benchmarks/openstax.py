"""The procedure of quickstart on other people's text: forget one textbook, keep the rest, judge on glossary questions.

    python benchmarks/openstax.py DATA_FOLDER [--topics astronomy psychology ...] [--json] [--out OUT]

DATA_FOLDER holds `openstax/BOOK/text.jsonl.gz`, `openstax/BOOK/glossary_mc.jsonl` and `corpus/NAME.jsonl.gz`. Sections
are cut into passages about as long as the questions; of each text a share is taken by a hash. Hyperparameters are
those of quickstart. OUT/TOPIC gets the guardrail and, in its `texts`, the passages, for `saeguard eval --topic-text`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from saeguard.config import PRESETS
from saeguard.corpus import Corpus, text_key
from saeguard.embedded import LAYER, embedded_model, embedded_sae
from saeguard.evaluation.mcq import accuracy, answer_questions, read_questions, trigger_rate
from saeguard.fitting import fit
from saeguard.guardrail import Guardrail
from saeguard.quickstart import ALPHA, STRENGTH

PASSAGE_WORDS = 30
PASSAGES = 800
QUESTIONS = 100
NEAR = {
    "american_government": ("us_history",),
    "psychology": ("sociology",),
    "sociology": ("psychology",),
    "us_history": ("american_government", "world_history"),
    "world_history": ("us_history",),
}
"""Neighbours of a topic. Everything else is far from it."""


def passages(path: Path, count: int = PASSAGES) -> list[str]:
    """Up to `count` passages of a text file, in the order of their hash."""
    found = {passage for text in Corpus.of(path.stem, "retain", path).read() for passage in _cut(text)}
    return sorted(found, key=text_key)[:count]


def _cut(text: str) -> Iterator[str]:
    words = text.split()
    for start in range(0, len(words), PASSAGE_WORDS):
        yield " ".join(words[start : start + PASSAGE_WORDS])


def save(guardrail: Guardrail, texts: dict[str, list[str]], folder: Path) -> None:
    """The guardrail, and beside it the passages as they went into it."""
    guardrail.save_pretrained(folder)
    (folder / "texts").mkdir(exist_ok=True)
    for name, some in texts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in some)
        (folder / "texts" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--topics", nargs="*", default=["astronomy"])
    parser.add_argument("--alpha", type=float, default=ALPHA)
    parser.add_argument("--gate", default="probe")
    parser.add_argument("--moment", default="running", choices=["running", "block"])
    parser.add_argument("--strength", type=float, default=STRENGTH)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--passages", type=int, default=PASSAGES, help="at most this many of each text")
    parser.add_argument("--work", type=Path, default=Path("openstax.work"))
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def fitted(model: Any, tokenizer: Any, texts: dict[str, list[str]], topic: str, args: argparse.Namespace) -> Guardrail:
    """The guardrail against one of the texts."""
    config = replace(
        PRESETS["default"], name=topic, alpha=args.alpha, gate=args.gate, moment=args.moment, strength=args.strength
    )
    retain = {name: some for name, some in texts.items() if name != topic}
    return fit(
        model, tokenizer, embedded_sae(), layer=LAYER, forget=texts[topic], retain=retain, config=config,
        work_dir=args.work / topic, show_progress=True,
    )  # fmt: skip


def judge(
    model: Any, tokenizer: Any, guardrail: Guardrail, topic: str, books: Mapping[str, Path]
) -> list[dict[str, Any]]:
    """A row for the questions of each book: without and with the guardrail."""
    rows = []
    for name, path in books.items():
        questions = read_questions(path.with_name("glossary_mc.jsonl"))[: None if name == topic else QUESTIONS]
        plain = answer_questions(model, tokenizer, questions)
        guarded = answer_questions(model, tokenizer, questions, guardrail)
        role = "topic" if name == topic else "near" if name in NEAR.get(topic, ()) else "far"
        rows.append({
            "name": name, "role": role, "n": len(questions), "unguarded": accuracy(plain).value,
            "guarded": accuracy(guarded).value, "trigger_rate": trigger_rate(guarded).value,
        })  # fmt: skip
    return rows


def line(topic: str, rows: Sequence[Mapping[str, Any]], guardrail: Guardrail) -> str:
    """What the topic's row of a table over topics says, in Markdown; of the others those that change most."""

    def worst(role: str) -> str:
        change = {row["name"]: row["guarded"] - row["unguarded"] for row in rows if row["role"] == role}
        name, points = min(change.items(), key=lambda pair: pair[1], default=("", 0.0))
        return f"{100 * points:+.0f} ({name})" if name else "-"

    (own,) = (row for row in rows if row["role"] == "topic")
    far = [row for row in rows if row["role"] == "far"]
    caught = guardrail.evidence["gates"][guardrail.rule.gate.kind]["caught"]["rate"]
    cells = [
        topic, own["n"], f"{own['unguarded']:.3f}", f"{own['guarded']:.3f}", f"{own['trigger_rate']:.2f}",
        f"{caught:.2f}", worst("near"), worst("far"),
        f"{100 * sum(row['guarded'] - row['unguarded'] for row in far) / len(far):+.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def summary(rows: Sequence[Mapping[str, Any]], guardrail: Guardrail) -> dict[str, Any]:
    """All figures of a topic, for JSON."""
    gates = {
        name: {"caught": gate["caught"], "auroc": gate["auroc"],
               "false_positives": {corpus: rate["rate"] for corpus, rate in gate["false_positives"].items()}}
        for name, gate in guardrail.evidence["gates"].items()
    }  # fmt: skip
    return {"sets": rows, "gates": gates, "contamination": guardrail.evidence["contamination"]}


def main() -> None:
    """Fit, judge, print."""
    args = arguments()
    model, tokenizer = embedded_model()
    books = {path.parent.name: path for path in sorted(args.data.glob("openstax/*/text.jsonl.gz"))}
    corpora = {path.name.removesuffix(".jsonl.gz"): path for path in sorted(args.data.glob("corpus/*.jsonl.gz"))}
    texts = {name: passages(path, args.passages) for name, path in ({**books, **corpora}).items()}
    if not args.json:
        print("| topic | n | unguarded | guarded | triggered | passages caught | worst near | worst far | mean far |")
        print(f"|{'---|' * 9}")
    for topic in args.topics:
        started = time.perf_counter()
        guardrail = fitted(model, tokenizer, texts, topic, args)
        if args.out:
            save(guardrail, texts, args.out / topic)
        rows = judge(model, tokenizer, guardrail, topic, books)
        seconds = {"topic": topic, "seconds": time.perf_counter() - started}
        print(json.dumps(seconds | summary(rows, guardrail)) if args.json else line(topic, rows, guardrail), flush=True)


if __name__ == "__main__":
    main()
