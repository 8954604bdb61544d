"""The procedure of quickstart on other people's text: forget one textbook, keep the rest, judge on glossary questions.

    python benchmarks/openstax.py DATA_FOLDER [--json] [--out OUT]

DATA_FOLDER holds `openstax/BOOK/text.jsonl.gz`, `openstax/BOOK/glossary_mc.jsonl` and `corpus/NAME.jsonl.gz`. Sections
are cut into passages about as long as the questions; of each text a share is taken by a hash. Hyperparameters are
those of quickstart. OUT gets the guardrail and, in OUT/texts, the passages, for `saeguard eval --topic-text`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from saeguard.config import PRESETS
from saeguard.corpus import Corpus, text_key
from saeguard.embedded import LAYER, embedded_model, embedded_sae
from saeguard.evaluation.mcq import accuracy, answer_questions, read_questions, trigger_rate
from saeguard.fitting import fit
from saeguard.guardrail import Guardrail
from saeguard.quickstart import ALPHA, STRENGTH

TOPIC = "astronomy"
PASSAGE_WORDS = 30
PASSAGES = 800
QUESTIONS = 100


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--gate", default="probe")
    parser.add_argument("--moment", default="running", choices=["running", "block"])
    parser.add_argument("--strength", type=float, default=STRENGTH)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--passages", type=int, default=PASSAGES, help="at most this many of each text")
    parser.add_argument("--work", default="openstax.work")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Fit, judge, print."""
    args = arguments()
    started = time.perf_counter()
    model, tokenizer = embedded_model()
    books = {path.parent.name: path for path in sorted(args.data.glob("openstax/*/text.jsonl.gz"))}
    corpora = {path.name.removesuffix(".jsonl.gz"): path for path in sorted(args.data.glob("corpus/*.jsonl.gz"))}
    texts = {name: passages(path, args.passages) for name, path in ({**books, **corpora}).items()}
    retain = {name: some for name, some in texts.items() if name != TOPIC}
    config = replace(
        PRESETS["default"], name=TOPIC, alpha=ALPHA, gate=args.gate, moment=args.moment, strength=args.strength
    )
    guardrail = fit(
        model, tokenizer, embedded_sae(), layer=LAYER, forget=texts[TOPIC], retain=retain, config=config,
        work_dir=args.work, show_progress=True,
    )  # fmt: skip
    if args.out:
        save(guardrail, texts, args.out)
    rows = []
    for name, path in books.items():
        questions = read_questions(path.with_name("glossary_mc.jsonl"))[: None if name == TOPIC else QUESTIONS]
        plain = answer_questions(model, tokenizer, questions)
        guarded = answer_questions(model, tokenizer, questions, guardrail)
        rows.append({
            "name": name, "n": len(questions), "unguarded": accuracy(plain).value, "guarded": accuracy(guarded).value,
            "trigger_rate": trigger_rate(guarded).value,
        })  # fmt: skip
        if not args.json:
            print(rows[-1], flush=True)
    gates = guardrail.evidence["gates"]
    summary = {
        name: {"caught": gate["caught"], "auroc": gate["auroc"],
               "false_positives": {corpus: rate["rate"] for corpus, rate in gate["false_positives"].items()}}
        for name, gate in gates.items()
    }  # fmt: skip
    print(json.dumps({"sets": rows, "gates": summary, "contamination": guardrail.evidence["contamination"],
                      "seconds": time.perf_counter() - started}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
