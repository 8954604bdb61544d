"""Do features chosen by an L1 penalty detect better than those that selection takes?

    python benchmarks/chosen_features.py DATA_FOLDER [--work DIR] [--topics astronomy ...] [--alphas 0.01 0.05]
        [--unscaled]

DATA_FOLDER and DIR as in `gates.py`, whose topics, passages, streams and questions these are. For n = 40 and 20, the
gates density and evidence are fitted and calibrated as in `fit` on

    ratio           what selection takes: of the features with a high importance ratio those of highest forget score
    L1              the n features that an L1 penalty leaves (chosen_l1.py), for the topic and against it
    L1, for it      the n that speak for the topic, where the penalty leaves n of them

The quarantined documents choose nothing by L1. Each is compared with `ratio` of the same n, gate and alpha text by
text: how many it alone catches (+) and how many the other alone (-).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import mean

from chosen_l1 import Activity, chosen
from gates import judge, line, outliers_of, parser_of, read_everything, selected, windows_of
from gates_paired import PAIRED, Row, against, alarms, caught, table
from gates_streams import FILLERS, Piece

from saeguard.config import PRESETS
from saeguard.detectors import fit_evidence
from saeguard.embedded import embedded_sae
from saeguard.gate import Density, Scorer
from saeguard.gates import Splits, calibrated
from saeguard.sae.slim import slim
from saeguard.sample import FORGET, ReadWindow, labelled_activity
from saeguard.selection import SelectionRule
from saeguard.shards import Shard

SIZES = (40, 20)
RATIO = "ratio"
Case = tuple[int, str, str, float]
"""n, which features, gate and alpha."""


@dataclass(frozen=True)
class Chosen(Row):
    """With the number of features that would be clamped."""

    clamped: int

    @property
    def others(self) -> float:
        """The share of questions that trigger, of the other topic of which most do."""
        return max(mean(hits) for hits in self.found["others"].values())


def feature_sets(
    shards: Mapping[str, Sequence[Shard]], activity: Activity, topic: str, *, scaled: bool
) -> Iterator[tuple[int, str, list[int]]]:
    """The ids of every set by n and name."""
    for n in SIZES:
        ratio = selected(shards, topic, SelectionRule(n=n))
        both, positive = (chosen(activity, topic, n, positive=only, scaled=scaled) for only in (False, True))
        shared, spoken = len(set(ratio) & set(positive)), sum(weight > 0 for weight in both.values())
        print(f"{topic}, n = {n}: {shared} of ratio are among L1, for it; of L1 {spoken} are for it", flush=True)
        yield from ((n, RATIO, ratio), (n, "L1", [*both]), (n, "L1, for it", [*positive]))


def judged(
    shards: Mapping[str, Sequence[Shard]], streams: Mapping[str, Sequence[Piece]], activity: Activity, topic: str,
    alphas: Sequence[float], *, scaled: bool,
) -> Iterator[tuple[Case, Chosen]]:  # fmt: skip
    """Every case of a topic."""
    sae = embedded_sae()
    outliers = outliers_of(windows_of(shards, topic, slim(sae, [0])))
    kept = activity.without({(topic if name == FORGET else name, document) for name, document in outliers})
    sets = list(feature_sets(shards, kept, topic, scaled=scaled))
    union = sorted({j for *_, ids in sets for j in ids})
    windows = windows_of(shards, topic, slim(sae, union))
    for n, name, ids in sets:
        splits = Splits.of(_of(windows, [union.index(j) for j in ids]), outliers)
        scorers: dict[str, Scorer] = {"density": Density(), "evidence": fit_evidence(labelled_activity(splits.fit))}
        for (gate, scorer), alpha in product(scorers.items(), alphas):
            result = calibrated(scorer, splits, replace(PRESETS["default"], alpha=alpha))
            yield (
                (n, name, gate, alpha),
                Chosen(
                    judge(result, slim(sae, ids), streams, topic),
                    [value > result.threshold for value in result.forget],
                    int(result.gate.clamped(n).sum()),
                ),
            )


def _of(windows: Sequence[ReadWindow], columns: Sequence[int]) -> list[ReadWindow]:
    return [replace(window, activations=window.activations[:, columns]) for window in windows]


def averages(rows: Mapping[Case, Sequence[Chosen]]) -> str:
    """Means over the topics of shares and rates, and the sums of what is caught by one alone."""
    columns = [
        "n", "features", "gate", "alpha", "clamped", "passages", "AUROC", "worst corpus", "alarms/1000",
        "worst alarms/1000", "worst other questions", *(f"after {filler}" for filler in FILLERS),
        *(f"paired, {which}" for which in PAIRED),
    ]  # fmt: skip
    lines = []
    for (n, name, gate, alpha), its in rows.items():
        shares = [caught(its, "passages"), mean(row.found["auroc"] for row in its), mean(row.worst for row in its)]
        rates = [*alarms([row.found for row in its]), mean(row.others for row in its)]
        rates += [caught(its, str(filler)) for filler in FILLERS]
        lines.append([
            n, name, gate, alpha, f"{mean(row.clamped for row in its):.0f}", *(f"{value:.3f}" for value in shares),
            *(f"{value:.2f}" for value in rates),
            *("" if name == RATIO else against(its, rows[n, RATIO, gate, alpha], which) for which in PAIRED),
        ])  # fmt: skip
    return table(columns, lines)


def main() -> None:
    """Read, choose, fit, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--unscaled", action="store_true", help="penalise the weights of shares as they are")
    args = parser.parse_args()
    books, shards, streams = read_everything(args.data, args.work)
    activity = Activity.of(embedded_sae(), [shard for its in shards.values() for shard in its])
    rows: dict[Case, list[Chosen]] = {}
    for topic in args.topics or books:
        own: dict[Case, list[Chosen]] = {}
        for case, row in judged(shards, streams, activity, topic, args.alphas, scaled=not args.unscaled):
            n, name, gate, alpha = case
            print(line(row.found | {"topic": topic, "alpha": alpha, "gate": f"{gate}, {name} {n}"}), flush=True)
            own[case] = [row]
            rows.setdefault(case, []).append(row)
        print(f"\n{topic}\n\n{averages(own)}\n", flush=True)
    print(f"all\n\n{averages(rows)}")


if __name__ == "__main__":
    main()
