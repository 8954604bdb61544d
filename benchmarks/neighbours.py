"""Near neighbours of a topic: gates that look at them twice, and rules for what the quarantine may take of them.

    python benchmarks/neighbours.py DATA_FOLDER [--work DIR] [--passages 800] [--topics psychology ...] [--rules now]

DATA_FOLDER and DIR as in `layers.py`; only layer 6 is used. Gates, each with one threshold that keeps alpha in all
corpora:

    one gate        what `fit` learns: the topic against everything else
    near x k        the same with the near corpora k times, so that they weigh k times
    near as far     the same with the near corpora as heavy as all far ones together
    two levels      triggers if both of two gates do: the topic and its neighbours against the far corpora, the
                    topic against its neighbours
    one and second  triggers if both the one gate and the second of those two do
    summed          one probe: the sum of the same two, each in units of its spread

Rules: `now`, what `fit` does; `off`, no quarantine; `off for near`, no neighbour loses documents; `off where over s`,
no retain corpus does of which more than the share s would be taken.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from gates import NEAR
from layers_read import Reading, parser_of, quarantined, read
from layers_topic import Row, Topic, averages, head, kept, scores
from torch import Tensor

from saeguard.embedded import LAYER

NEIGHBOURS = NEAR | {"economics": ("american_government", "sociology")}
SHARES = (0.02, 0.05)
Keys = frozenset[tuple[str, int]]


def shares(reading: Reading, topic: str, left_out: Keys) -> dict[str, float]:
    """The share of each corpus's documents, of those that fit and calibrate, that the quarantine takes."""
    documents = {entry.key for entry in reading.entries if entry.split in ("fit", "calibration")}
    total, taken = (Counter(name for name, _ in keys) for keys in (documents, left_out))
    return {name: taken[name] / total[name] for name in total}


def rules(reading: Reading, topic: str, left_out: Keys) -> dict[str, Keys]:
    """What each rule takes."""
    found = shares(reading, topic, left_out)
    some = {
        f"off where over {limit}": frozenset(key for key in left_out if key[0] == topic or found[key[0]] <= limit)
        for limit in SHARES
    }
    near = frozenset(key for key in left_out if key[0] not in NEIGHBOURS.get(topic, ()))
    return {"now": left_out, "off": frozenset(), "off for near": near, **some}


def gates(topic: Topic, hidden: Tensor, folder: Path, *, all_of_them: bool) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """Token scores (tokens,) of each gate by name; those of both where two gates have to trigger."""
    own, near, far = [topic.name], list(topic.near), topic.far
    folder.mkdir(parents=True, exist_ok=True)

    def learn(name: str, forget: list[str], retain: list[str]) -> Tensor:
        print(f"{topic.name}: {name}", file=sys.stderr, flush=True)
        probe = kept(folder / f"{topic.name}-{name}.safetensors", partial(topic.learn, hidden, forget, retain))
        return scores(probe, hidden)

    one = learn("one", own, far + near)
    if not all_of_them:
        return {"one gate": one}
    first, second = learn("first", own + near, far), learn("second", own, near)
    return {
        "one gate": one,
        "near x 4": learn("near-4", own, far + 4 * near),
        "near as far": learn("near-far", own, far + round(len(far) / len(near)) * near),
        "two levels": (first, second),
        "one and second": (one, second),
        "two levels, summed": first / first.std() + second / second.std(),
        "one and second, summed": one / one.std() + second / second.std(),
    }


def statistic(topic: Topic, found: Tensor | tuple[Tensor, ...], alpha: float) -> Tensor:
    """(windows,); of two gates the smaller, the first in units of its threshold for far corpora or all, the second in
    units of its threshold for near ones."""
    if isinstance(found, Tensor):
        return topic.statistic(found, alpha)
    first, second = found
    return torch.minimum(topic.statistic(first, alpha, topic.far), topic.statistic(second, alpha, topic.near))


def judged(topic: Topic, hidden: Tensor, folder: Path, rule: str, alphas: list[float]) -> dict[tuple[object, ...], Row]:
    """What each gate does at each alpha, by rule, alpha and gate."""
    full = rule != "off" and bool(topic.near)
    found = gates(topic, hidden, folder / rule.replace(" ", "-"), all_of_them=full)
    return {
        (rule, alpha, gate): topic.row(statistic(topic, its, alpha), alpha)
        for (gate, its), alpha in product(found.items(), alphas)
    }


def main() -> None:
    """Read, learn, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--topics", nargs="*", default=sorted(NEIGHBOURS))
    parser.add_argument("--rules", nargs="*")
    parser.add_argument("--alphas", type=float, nargs="*", default=[0.01, 0.05])
    args = parser.parse_args()
    reading = read(args.data, args.work, (LAYER,), args.passages)
    hidden, every = reading.hidden(LAYER), dict[tuple[object, ...], list[Row]]()
    print(head("topic", "quarantine", "alpha", "gate"))
    for name in args.topics:
        left_out = quarantined(reading, name, args.work)
        topic = Topic(reading, name, NEIGHBOURS.get(name, ()), left_out)
        taken = {corpus: f"{share:.1%}" for corpus, share in shares(reading, name, left_out).items() if share}
        print(f"{name}: the quarantine takes {taken}", file=sys.stderr, flush=True)
        rows: dict[tuple[object, ...], Row] = {}
        done: dict[Keys, str] = {}
        for rule, keys in rules(reading, name, left_out).items():
            if args.rules and rule not in args.rules:
                continue
            same = done.setdefault(keys, rule)
            if same == rule:
                found = judged(replace(topic, left_out=keys), hidden, args.work, rule, args.alphas)
            else:
                found = {(rule, *rest): row for (known, *rest), row in rows.items() if known == same}
            rows |= found
            for (_, alpha, gate), row in found.items():
                print(row.line(name, rule, alpha, gate, beside=rows.get(("now", alpha, "one gate"), row)), flush=True)
        for key, row in rows.items():
            every.setdefault(key, []).append(row)
    print("\n" + averages(every, "quarantine", "alpha", "gate"))


if __name__ == "__main__":
    main()
