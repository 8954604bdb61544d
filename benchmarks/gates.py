"""Gates compared over seven topics: what they catch, what they hit, how they do in long text.

    python benchmarks/gates.py DATA_FOLDER [--work DIR] [--topics astronomy psychology ...] [--alphas 0.01 0.05]

DATA_FOLDER as in `openstax.py`. Each book in turn is the topic and everything else is to be kept; psychology beside
sociology and US history beside world history are the hard ones. The residual streams are computed once (resumed where
a run was cut off) and every gate is fitted, calibrated and tested from them:

    windows     passages of 30 words; the figures are of the test split
    streams     each corpus's test passages one after another, 4,000 tokens, read as one sequence
    questions   glossary questions of every topic, after 0 to 4,000 tokens of another corpus's stream

Neither streams nor questions fit or calibrate anything, or choose a gate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gates_streams import Ids, Piece, read_stream, test_stream
from openstax import passages

from saeguard.config import PRESETS
from saeguard.corpus import Corpus
from saeguard.embedded import LAYER, embedded_model, embedded_sae
from saeguard.evaluation.mcq import PROMPT, read_questions
from saeguard.progress import progress
from saeguard.shards import Pass, Shard, estimated_tokens, run_pass
from saeguard.windows import Windower

QUESTIONS = 60
SAMPLE = 10**6


def files(data: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The books, and all that is read, by name."""
    books = {path.parent.name: path for path in sorted(data.glob("openstax/*/text.jsonl.gz"))}
    others = {path.name.removesuffix(".jsonl.gz"): path for path in sorted(data.glob("corpus/*.jsonl.gz"))}
    return books, books | others


def read_windows_of(
    model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], work: Path
) -> dict[str, list[Shard]]:
    """The shards of every corpus."""
    corpora = {name: Corpus.of(name, "retain", its) for name, its in texts.items()}
    summaries = {name: corpus.summary() for name, corpus in corpora.items()}
    windower = Windower(tokenizer, PRESETS["default"].lengths, chat=True)
    with progress("reading", estimated_tokens(summaries.values()), unit="tokens") as advance:
        return run_pass(
            Pass(model, tokenizer, embedded_sae(), LAYER, windower, SAMPLE), corpora, summaries, work, advance
        )


def read_streams(
    model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], books: Mapping[str, Path], work: Path
) -> dict[str, list[Piece]]:
    """Every corpus's stream, with its share of the questions of the other corpora."""
    shares: dict[str, list[tuple[str, Ids]]] = {name: [] for name in texts}
    for topic, path in books.items():
        others = [name for name in texts if name != topic]
        for place, question in enumerate(read_questions(path.with_name("glossary_mc.jsonl"))[:QUESTIONS]):
            ids = tokenizer("\n\n" + PROMPT.format(question=question.text), add_special_tokens=False)["input_ids"]
            shares[others[place % len(others)]].append((topic, ids))
    found = {}
    for name, its in texts.items():
        path = work / f"stream-{name}.safetensors"
        found[name] = read_stream(model, tokenizer, LAYER, test_stream(tokenizer, its), shares[name], path)
        print(f"stream of {name}: {len(found[name])} pieces", flush=True)
    return found


def main() -> None:
    """Read, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("gates.work"))
    parser.add_argument("--topics", nargs="*")
    parser.add_argument("--alphas", type=float, nargs="*", default=[0.01, 0.05])
    args = parser.parse_args()
    model, tokenizer = embedded_model()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[: LAYER + 1], LAYER + 1
    books, everything = files(args.data)
    texts = {name: passages(path) for name, path in everything.items()}
    args.work.mkdir(parents=True, exist_ok=True)
    shards = read_windows_of(model, tokenizer, texts, args.work)
    streams = read_streams(model, tokenizer, texts, books, args.work)
    print(json.dumps({name: [len(shards[name]), len(streams[name])] for name in texts}))


if __name__ == "__main__":
    main()
