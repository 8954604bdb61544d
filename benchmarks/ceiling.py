"""How many questions about a topic could any gate on these streams catch at 0.01, and what limits it?

    python benchmarks/ceiling.py DATA_FOLDER [--work DIR] [--passages 800] [--topics astronomy] [--alpha 0.01]

DATA_FOLDER and DIR as in `layers.py`, which is to be run first: it reads the streams and learns the probes. Each row is
a way to make one number of a window:

    probe    what `fit` has: the probe's scores accumulated as a CUSUM
    mean     logistic regression on the window's mean, decided at its end: it has read the whole question, and cannot
             be used as it is, since text in front of the question dilutes it
    last     logistic regression on its last token
    either   the larger of probe and mean, each in units of its threshold
    of 1/k   learned from every k-th document of all corpora
    forms    learned from texts like questions too, made of every third passage by templates of our own

All are calibrated as in `fit`. *Caught* and *false* are at that threshold: questions of the topic, and of the other
book of which most trigger. *Could* is what the least threshold that spares all but alpha of the questions of every
other book catches: with the labels at hand, no calibration can do better with these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gates import files
from layers import LAYERS
from layers_read import Reading, entries_of, parser_of, quarantined, read, write
from layers_topic import Row, Topic, averages, kept, near_of, scores
from numpy.typing import NDArray
from openstax import passages
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from saeguard.calibration import Rate
from saeguard.corpus import Corpus
from saeguard.detectors import balanced
from saeguard.embedded import LAYER, embedded_model
from saeguard.windows import Window, text_ids

Rows = NDArray[np.float64]
EVERY = 3
WORDS = 18
FORMS = (
    "Question: What is being described here? {text}\nAnswer:",
    "Which subject is this about? {text}",
    "Q: Is the following true or false? {text}\nA:",
    "Name the thing that is meant. {text}\nIt is",
    "Can you explain this to me: {text}",
    "Test yourself.\n1. {text}\nSolution:",
)


@dataclass(frozen=True)
class Bench:
    """A topic, its streams, and where learned probes are kept."""

    topic: Topic
    work: Path
    alpha: float

    def probe(self, name: str, learner: Topic | None = None) -> Tensor:
        """The statistic (windows,) of a probe of this name, learned by `learner`, in units of its threshold."""
        layer, learner = int(name.split("-")[0]), learner or self.topic
        path = self.work / f"probe-{learner.name}-{name}.safetensors"
        probe = kept(path, lambda: learner.learn(learner.reading.hidden(layer), [learner.name], learner.retain))
        return self.topic.statistic(scores(probe, self.topic.reading.hidden(layer)), self.alpha)

    def regression(self, x: Rows, learner: Topic | None = None, learned: Rows | None = None) -> Tensor:
        """The log-odds (windows,) of rows `x` (windows, columns), learned by `learner` from `learned` or from them."""
        learner, learned = learner or self.topic, x if learned is None else learned
        fit = learner.places("fit")
        forget = np.array([entry.corpus == learner.name for entry in learner.reading.entries])[fit]
        found = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
        found.fit(learned[fit], forget, logisticregression__sample_weight=balanced(forget))
        return torch.tensor(found.decision_function(x))

    def either(self, one: Tensor, other: Tensor) -> Tensor:
        """The larger of two statistics, each in units of its threshold."""
        return torch.maximum(*(its / self.topic.threshold(its, self.alpha) for its in (one, other)))

    def line(self, name: str, statistic: Tensor) -> str:
        """A row of the table, in Markdown."""
        topic, row = self.topic, self.topic.row(statistic, self.alpha)
        threshold = topic.threshold(statistic, self.alpha)
        own = statistic[topic.places("question", [topic.name])]
        others = {name: statistic[topic.places("question", [name])] for name in topic.retain}
        others = {name: its.sort(descending=True).values for name, its in others.items() if len(its)}
        worst = max(others, key=lambda name: int((others[name] > threshold).sum()))
        could = max(float(its[int(self.alpha * len(its))]) for its in others.values())
        corpus, rate = max((row.near | row.far).items(), key=lambda pair: pair[1].value)
        cells = [
            topic.name, name, *(f"{Rate(sum(its), len(its)).value:.2f}" for its in (row.questions, row.passages)),
            f"{float((others[worst] > threshold).float().mean()):.3f} ({worst})", f"{rate.value:.3f} ({corpus})",
            f"{float((own > could).float().mean()):.2f}",
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |"


def rows(bench: Bench, more: Topic) -> Iterator[tuple[str, Tensor]]:
    """Every way, by name; `more` is the topic with texts like questions."""
    topic, all_means = bench.topic, []
    for layer in LAYERS:
        all_means.append(means(topic, layer))
        yield f"probe, layer {layer}", bench.probe(str(layer))
        yield f"mean, layer {layer}", bench.regression(all_means[-1])
    yield "mean, all layers", bench.regression(np.concatenate(all_means, axis=1))
    x = all_means[LAYERS.index(LAYER)]
    last = torch.stack([part[-1] for part in topic.reading.hidden(LAYER).split(topic.sizes)])
    yield f"last, layer {LAYER}", bench.regression(last.double().numpy())
    yield f"either, layer {LAYER}", bench.either(bench.probe(str(LAYER)), bench.regression(x))
    for share in (2, 4, 8):
        dropped = {entry.key for entry in topic.reading.entries if entry.split == "fit" and entry.document // 2 % share}
        fewer = replace(topic, left_out=topic.left_out | dropped)
        yield f"probe, layer {LAYER}, of 1/{share}", bench.probe(f"{LAYER}-of-{share}", fewer)
        yield f"mean, layer {LAYER}, of 1/{share}", bench.regression(x, fewer)
    probe, mean = bench.probe(f"{LAYER}-forms", more), bench.regression(x, more, means(more, LAYER))
    yield f"probe, layer {LAYER}, forms", probe
    yield f"mean, layer {LAYER}, forms", mean
    yield f"either, layer {LAYER}, forms", bench.either(probe, mean)


def means(topic: Topic, layer: int) -> Rows:
    """Window means (windows, d_model)."""
    parts = topic.reading.hidden(layer).split(topic.sizes)
    return torch.stack([part.float().mean(dim=0) for part in parts]).double().numpy()


def with_forms(reading: Reading, data: Path, work: Path, count: int) -> Reading:
    """The same and texts like questions, made of the corpora's own passages and in the split of these."""
    model, parts = embedded_model(), []
    for name, path in files(data)[1].items():
        parts.append(work / f"forms-{name}.safetensors")
        if not parts[-1].exists():
            write(model, (LAYER,), name, _forms(model[1], path, count), parts[-1])
    return Reading([*reading.entries, *(entry for path in parts for entry in entries_of(path))],
                   [*reading.parts, *parts])  # fmt: skip


def _forms(tokenizer: object, path: Path, count: int) -> list[Window]:
    found = []
    for place, document in enumerate(Corpus.of(path.stem, "retain", passages(path, count)).documents()):
        if place % EVERY == 0:
            words = " ".join(document.text.split()[:WORDS])
            text = FORMS[place // EVERY % len(FORMS)].format(text=words[:1].upper() + words[1:])
            found.append(Window(document.index, document.split, 1, tuple(text_ids(tokenizer, "\n\n" + text)), words))
    return found


def main() -> None:
    """Read, learn, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--topics", nargs="*", default=["astronomy"])
    parser.add_argument("--alpha", type=float, default=0.01)
    args = parser.parse_args()
    reading = read(args.data, args.work, LAYERS, args.passages)
    more = with_forms(reading, args.data, args.work, args.passages)
    print("| topic | gate | questions | passages | questions, false | passages, false | questions, could |")
    print("|---|---|---|---|---|---|---|")
    found: dict[tuple[object, ...], list[Row]] = {}
    for name in args.topics:
        topic = Topic(reading, name, near_of(name), quarantined(reading, name, args.work))
        bench = Bench(topic, args.work, args.alpha)
        for label, statistic in rows(bench, replace(topic, reading=more)):
            found.setdefault((label,), []).append(topic.row(statistic, args.alpha))
            print(bench.line(label, statistic), flush=True)
    print("\n" + averages(found, "gate"))


if __name__ == "__main__":
    main()
