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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gates_streams import FILLERS, Ids, Piece, masks_of, read_stream, test_stream
from openstax import NEAR, passages
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from saeguard.calibration import Rate
from saeguard.config import PRESETS, FitConfig
from saeguard.contamination import find_contamination
from saeguard.corpus import Corpus
from saeguard.detectors import balanced
from saeguard.embedded import LAYER, embedded_model, embedded_sae
from saeguard.evaluation.mcq import PROMPT, read_questions
from saeguard.evidence import GateResult
from saeguard.gate import Probe
from saeguard.gates import Splits, calibrated, fit_gates
from saeguard.longrun import Scored, alarms, read_scored
from saeguard.progress import progress
from saeguard.sae.slim import SlimEncoder, slim
from saeguard.sample import FORGET, ReadWindow, labelled_means, read_windows
from saeguard.selection import SelectionRule, select
from saeguard.shards import Pass, Shard, estimated_tokens, run_pass
from saeguard.statistics import FeatureStatistics
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


def selected(shards: Mapping[str, Sequence[Shard]], topic: str, rule: SelectionRule) -> list[int]:
    """The features that a rule selects for a topic."""
    statistics = {
        name: reduce(FeatureStatistics.merge, (shard.statistics() for shard in its)) for name, its in shards.items()
    }
    forget = statistics.pop(topic)
    return [each.id for each in select(forget, statistics, rule)]


def windows_of(shards: Mapping[str, Sequence[Shard]], topic: str, encoder: SlimEncoder) -> list[ReadWindow]:
    """All windows, those of the topic as forget text."""
    read = read_windows([shard for its in shards.values() for shard in its], encoder)
    return [replace(window, corpus=FORGET) if window.corpus == topic else window for window in read]


def outliers_of(windows: Sequence[ReadWindow]) -> frozenset[tuple[str, int]]:
    """The documents that `fit` would quarantine."""
    return find_contamination([window for window in windows if window.split != "test"]).outliers


def read_topic(shards: Mapping[str, Sequence[Shard]], topic: str) -> tuple[SlimEncoder, Splits]:
    """The encoder of the features selected for a topic, and all windows, those of the topic as forget text."""
    encoder = slim(embedded_sae(), selected(shards, topic, FitConfig().selection))
    windows = windows_of(shards, topic, encoder)
    return encoder, Splits.of(windows, outliers_of(windows))


def probe_of_means(windows: Sequence[ReadWindow]) -> Probe:
    """A probe as it is learned from window means: logistic regression, the bias such that retain text scores 0."""
    data = labelled_means(windows)
    scaler, share = StandardScaler().fit(data.x), balanced(data.forget)
    regression = LogisticRegression(C=0.01, max_iter=2000).fit(scaler.transform(data.x), data.forget, share)
    weights = regression.coef_[0] / scaler.scale_
    mean = np.average(data.x[~data.forget], axis=0, weights=share[~data.forget])
    return Probe(torch.tensor(weights, dtype=torch.float32), -float(mean @ weights))


def judge(
    result: GateResult, encoder: SlimEncoder, streams: Mapping[str, Sequence[Piece]], topic: str
) -> dict[str, Any]:
    """What one gate does on windows, streams and questions, the bare ones of other topics among them."""
    near = {name: rate for name, rate in result.false_positives.items() if name in NEAR.get(topic, ())}
    far = {name: rate for name, rate in result.false_positives.items() if name not in near}
    caught: dict[int, list[bool]] = {filler: [] for filler in FILLERS}
    others: dict[str, list[bool]] = {}
    false = {}
    for name, pieces in streams.items():
        if name == topic:
            continue
        stream = _scored(result, encoder, next(piece for piece in pieces if not piece.topic))
        false[name] = alarms(result.gate.accumulator, stream, result.threshold), int(stream.counted.sum())
        for piece in pieces:
            if piece.topic == topic or (piece.topic and not piece.filler):
                hit = _catches(result, stream, _scored(result, encoder, piece), piece.filler)
                (caught[piece.filler] if piece.topic == topic else others.setdefault(piece.topic, [])).append(hit)
    return {
        "caught": result.caught, "auroc": result.auroc, "near": _worst(near), "far": _worst(far),
        "questions": caught, "others": others, "false_alarms": false,
    }  # fmt: skip


def _worst(rates: Mapping[str, Rate]) -> tuple[str, Rate] | None:
    return max(rates.items(), key=lambda pair: pair[1].value, default=None)


def _scored(result: GateResult, encoder: SlimEncoder, piece: Piece) -> Scored:
    scores, counted = result.gate.scored(piece.hidden[None], encoder(piece.hidden)[None] > 0, masks_of(piece.valid))
    return Scored(scores[0], counted[0])


def _catches(result: GateResult, stream: Scored, question: Scored, filler: int) -> bool:
    """Whether the gate triggers at a token of the question; what it may have done before does not count."""
    scores = torch.cat([stream.scores[:filler], question.scores])
    counted = torch.cat([stream.counted[:filler], question.counted])
    found = read_scored(result.gate.accumulator, Scored(scores, counted))
    return bool((found[filler:] > result.threshold).any())


def line(row: Mapping[str, Any]) -> str:
    """A row of the table, in Markdown."""
    found, tokens = (sum(part) for part in zip(*row["false_alarms"].values(), strict=True))
    worst = max(row["false_alarms"].items(), key=lambda pair: pair[1][0] / pair[1][1])
    cells = [
        row["topic"], row["alpha"], row["gate"], f"{row['caught'].value:.3f}", f"{row['auroc']:.3f}",
        *("-" if its is None else f"{its[1].value:.3f} ({its[0]})" for its in (row["near"], row["far"])),
        f"{1000 * found / tokens:.2f}", f"{1000 * worst[1][0] / worst[1][1]:.2f} ({worst[0]})",
        *(f"{sum(found) / len(found):.2f}" for found in row["questions"].values()),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def read_everything(data: Path, work: Path) -> tuple[dict[str, Path], dict[str, list[Shard]], dict[str, list[Piece]]]:
    """The books, and the shards and the stream of every corpus; from `work` where they are there."""
    model, tokenizer = embedded_model()
    model.model.layers, model.config.num_hidden_layers = model.model.layers[: LAYER + 1], LAYER + 1
    books, everything = files(data)
    texts = {name: passages(path) for name, path in everything.items()}
    work.mkdir(parents=True, exist_ok=True)
    shards = read_windows_of(model, tokenizer, texts, work)
    return books, shards, read_streams(model, tokenizer, texts, books, work)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options of all that compares gates on these topics."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("gates.work"))
    parser.add_argument("--topics", nargs="*")
    parser.add_argument("--alphas", type=float, nargs="*", default=[0.01, 0.05])
    return parser


def main() -> None:
    """Read, fit, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--per-1000", type=float)
    args = parser.parse_args()
    books, shards, streams = read_everything(args.data, args.work)
    heads = ["topic", "alpha", "gate", "caught", "AUROC", "worst near", "worst far", "alarms/1000", "worst alarms/1000"]
    print(f"| {' | '.join([*heads, *(f'question after {filler}' for filler in FILLERS)])} |")
    for topic in args.topics or books:
        encoder, splits = read_topic(shards, topic)
        config = replace(PRESETS["default"], alpha=args.alphas[0], per_1000=args.per_1000)
        scorers = {name: result.gate.scorer for name, result in fit_gates(splits, config, forget=True).items()}
        scorers["probe, window means"] = probe_of_means(splits.fit)
        for alpha, (name, scorer) in product(args.alphas, scorers.items()):
            row = judge(calibrated(scorer, splits, replace(config, alpha=alpha)), encoder, streams, topic)
            print(line(row | {"topic": topic, "alpha": alpha, "gate": name}), flush=True)


if __name__ == "__main__":
    main()
