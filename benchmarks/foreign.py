"""What `fit` says of forget text that is partly foreign, and of a topic that is not, by the shares it warns by.

    python benchmarks/foreign.py DATA_FOLDER [--work DIR] [--passages 800] [--topics astronomy ...]

DATA_FOLDER and DIR as in `layers.py`; only layer 6 is used. First the seven topics as they are, then topics with
documents of another corpus among their own (taken out of that corpus). *Left out* is what the quarantine takes of the
topic, *among retain* the share of the topic that scores below the highest twentieth of retain documents; the next two
are the same shares of the foreign documents. *Retain* lists the corpora of which surely more than 2 % reads like the
topic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from layers_read import Entry, Reading, parser_of, read

from saeguard.calibration import Rate
from saeguard.contamination import Contamination, contamination
from saeguard.detectors import LabelledWindows, cross_fitted_scores
from saeguard.embedded import LAYER
from saeguard.report.overlap import FOREIGN
from saeguard.sample import FORGET

MIXED = (
    ("astronomy", "wikipedia_wt2", 0.05), ("astronomy", "wikipedia_wt2", 0.1), ("astronomy", "wikipedia_wt2", 0.2),
    ("astronomy", "fiction_classics", 0.2), ("economics", "brown_mixed", 0.1), ("psychology", "sociology", 0.2),
)  # fmt: skip
Keys = frozenset[tuple[str, int]]


@dataclass(frozen=True)
class Texts:
    """The windows of the fit and calibration splits, and their means (windows, d_model)."""

    entries: Sequence[Entry]
    means: torch.Tensor

    @classmethod
    def of(cls, reading: Reading) -> Texts:
        """All that is read, but for test text and questions."""
        parts = reading.hidden(LAYER).split([entry.tokens for entry in reading.entries])
        places = [place for place, entry in enumerate(reading.entries) if entry.split in ("fit", "calibration")]
        means = torch.stack([parts[place].float().mean(dim=0) for place in places])
        return cls([reading.entries[place] for place in places], means.double())

    def some(self, corpus: str, share: float, of: str) -> Keys:
        """As many documents of a corpus as make up this share of a topic that is mixed with them."""
        own = len({entry.key for entry in self.entries if entry.corpus == of})
        every = sorted({entry.key for entry in self.entries if entry.corpus == corpus})
        chosen = np.random.default_rng(0).permutation(len(every))[: round(share / (1 - share) * own)]
        return frozenset(every[place] for place in chosen)

    def judged(self, topic: str, foreign: Keys) -> Contamination:
        """What `fit` finds for a topic to which the foreign documents belong too, numbered from a million."""
        entries = [
            replace(entry, corpus=FORGET, document=entry.document + 10**6 * (entry.key in foreign))
            if entry.corpus == topic or entry.key in foreign else entry
            for entry in self.entries
        ]  # fmt: skip
        labelled = LabelledWindows(
            self.means.numpy(), np.array([entry.corpus == FORGET for entry in entries]),
            [entry.corpus for entry in entries], [entry.document for entry in entries],
        )  # fmt: skip
        return contamination(entries, cross_fitted_scores(labelled).tolist())


def line(topic: str, other: str, share: float, found: Contamination) -> str:
    """A row of the table, in Markdown."""
    retain = {name: rate for name, rate in found.shares.items() if name != FORGET}
    highest = float(np.quantile([s.score for s in found.suspects if s.corpus != FORGET], 0.95))
    foreign = [s for s in found.suspects if s.corpus == FORGET and s.document >= 10**6]
    near = [f"{name} {rate.value:.1%}" for name, rate in retain.items() if rate.interval[0] > FOREIGN]
    shares = [Rate(sum(its), len(its)) for its in ([s.outlier for s in foreign], [s.score <= highest for s in foreign])]
    cells = [
        topic, f"{share:.0%} {other}" if foreign else "-", f"{found.shares[FORGET].value:.1%}",
        f"{found.forget_among_retain.value:.1%}", *(f"{rate.value:.0%}" if foreign else "-" for rate in shares),
        ", ".join(near) or "-",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Read, judge, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--topics", nargs="*")
    args = parser.parse_args()
    reading = read(args.data, args.work, (LAYER,), args.passages)
    named = args.topics or dict.fromkeys(entry.corpus for entry in reading.entries if entry.split == "question")
    jobs = [*((name, "", 0.0) for name in named), *(job for job in MIXED if job[0] in named)]
    texts = Texts.of(reading)
    print("| topic | foreign | left out | among retain | foreign, left out | foreign, among retain | retain |")
    print("|---|---|---|---|---|---|---|")
    for topic, other, share in jobs:
        foreign = texts.some(other, share, topic) if share else frozenset()
        print(line(topic, other, share, texts.judged(topic, foreign)), flush=True)


if __name__ == "__main__":
    main()
