"""Does a gate on another layer, or on several, catch more at the same promise?

    python benchmarks/layers.py DATA_FOLDER [--work DIR] [--passages 800] [--topics astronomy ...] [--alphas 0.01 0.05]

DATA_FOLDER as in `openstax.py`. All layers are read in one pass. Each alone is a probe learned as `fit` learns it, with
its own drift. Pairs are joined by the largest and the smallest of their statistics and by the sum of their token
scores, each in units of its spread; `--concatenate` also learns one probe on both layers at once. Every gate, joined or
not, gets one threshold that keeps alpha in each of the other 14 corpora. The quarantine is the one of layer 6.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path

import torch
from layers_read import Reading, parser_of, quarantined, read
from layers_topic import Row, Topic, averages, head, kept, near_of, scores
from torch import Tensor

from saeguard.embedded import LAYER

LAYERS = (3, 6, 9, 12, 16, 20)
JOINED = ((6, 12), (6, 9, 12))


def gates(topic: Topic, by_layer: dict[int, Tensor], joined: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The statistic of every gate by its name, the layer of `fit` alone first."""
    alone = {layer: topic.statistic(its, alpha) for layer, its in by_layer.items()}
    scaled = {layer: its / its.std() for layer, its in by_layer.items()}
    found = {str(layer): alone[layer] for layer in (LAYER, *(layer for layer in LAYERS if layer != LAYER))}
    for one, other in combinations(LAYERS, 2):
        both = torch.stack([alone[one], alone[other]])
        found[f"{one} or {other}"] = both.amax(dim=0)
        found[f"{one} and {other}"] = both.amin(dim=0)
        found[f"{one} + {other}"] = topic.statistic(scaled[one] + scaled[other], alpha)
    found["all, summed"] = topic.statistic(torch.stack(list(scaled.values())).sum(dim=0), alpha)
    return found | {name: topic.statistic(its, alpha) for name, its in joined.items()}


def learned(topics: Sequence[Topic], reading: Reading, layers: tuple[int, ...], work: Path) -> list[Tensor]:
    """Token scores (tokens,) of each topic's probe on these layers."""
    hidden, found = torch.cat([reading.hidden(layer) for layer in layers], dim=1), []
    for topic in topics:
        path = work / f"probe-{topic.name}-{'-'.join(map(str, layers))}.safetensors"
        probe = kept(path, partial(topic.learn, hidden, [topic.name], topic.retain))
        found.append(scores(probe, hidden))
        print(f"learned {topic.name} on {layers}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Read, learn, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--topics", nargs="*")
    parser.add_argument("--alphas", type=float, nargs="*", default=[0.01, 0.05])
    parser.add_argument("--concatenate", action="store_true")
    args = parser.parse_args()
    reading = read(args.data, args.work, LAYERS, args.passages)
    names = args.topics or list(dict.fromkeys(entry.corpus for entry in reading.entries if entry.split == "question"))
    topics = [Topic(reading, name, near_of(name), quarantined(reading, name, args.work)) for name in names]
    by_layer = {layer: learned(topics, reading, (layer,), args.work) for layer in LAYERS}
    joined = {layers: learned(topics, reading, layers, args.work) for layers in JOINED if args.concatenate}
    rows: dict[tuple[object, ...], list[Row]] = {}
    print(head("topic", "alpha", "layers"))
    for (place, topic), alpha in product(enumerate(topics), args.alphas):
        one_of = {f"{layers} learned at once": its[place] for layers, its in joined.items()}
        found = gates(topic, {layer: its[place] for layer, its in by_layer.items()}, one_of, alpha)
        first = topic.row(found[str(LAYER)], alpha)
        for name, statistic in found.items():
            row = topic.row(statistic, alpha)
            rows.setdefault((alpha, name), []).append(row)
            print(row.line(topic.name, alpha, name, beside=first), flush=True)
    print("\n" + averages(rows, "alpha", "layers"))


if __name__ == "__main__":
    main()
