"""One topic's gates on what `layers_read.py` has read: learn probes, calibrate statistics, count.

A gate's statistic of a window is its largest CUSUM in units of the gate's threshold: above 1 it triggers alone. So
gates of several layers, or of several questions, are joined by the largest of them (any triggers), the smallest (all
have triggered) or the sum of their token scores. A joint statistic is calibrated as every other is: one conformal
threshold that keeps alpha in every corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from gates import NEAR
from layers_read import Reading
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saeguard.calibration import Conformal, Rate, calibrate, rate_above
from saeguard.detectors import LabelledTokens, fit_probe
from saeguard.gate import Cusum, Probe
from saeguard.gates import DRIFTS


@dataclass(frozen=True)
class Topic:
    """A topic; `left_out` are the documents kept out of learning and calibration, `near` its neighbours."""

    reading: Reading
    name: str
    near: Collection[str]
    left_out: frozenset[tuple[str, int]]
    sizes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", [entry.tokens for entry in self.reading.entries])

    def places(self, split: str, corpora: Collection[str] | None = None) -> list[int]:
        """Windows of a split, of these corpora or of all."""
        return [
            place
            for place, entry in enumerate(self.reading.entries)
            if entry.split == split
            and (corpora is None or entry.corpus in corpora)
            and (split in ("test", "question") or entry.key not in self.left_out)
        ]

    @property
    def retain(self) -> list[str]:
        """All other corpora."""
        return [name for name in dict.fromkeys(entry.corpus for entry in self.reading.entries) if name != self.name]

    @property
    def far(self) -> list[str]:
        """Those that are no neighbours."""
        return [name for name in self.retain if name not in self.near]

    def learn(self, hidden: Tensor, forget: Collection[str], retain: Sequence[str]) -> Probe:
        """A probe of some corpora against others; a corpus named k times weighs k times."""
        chosen = [*self.places("fit", forget), *(p for name in retain for p in self.places("fit", [name]))]
        parts = hidden.split(self.sizes)
        return fit_probe(
            LabelledTokens(
                torch.cat([parts[place] for place in chosen]).float(),
                torch.tensor([self.sizes[place] for place in chosen]),
                torch.tensor([self.reading.entries[place].corpus in forget for place in chosen]),
            )
        )

    def statistic(self, scores: Tensor, alpha: float, corpora: Collection[str] | None = None) -> Tensor:
        """(windows,) from token scores (tokens,), by the drift that triggers soonest, as in `fit`; the threshold that
        is its unit keeps alpha in these corpora, or in all."""
        parts = scores.split(self.sizes)
        padded = pad_sequence(list(parts), batch_first=True)
        counted = torch.arange(padded.shape[1]) < torch.tensor(self.sizes)[:, None]
        unit = float(torch.cat([parts[place] for place in self.places("fit", [self.name])]).mean())
        topic, best = self.places("calibration", [self.name]), (2.0, torch.empty(0))
        for drift in DRIFTS:
            accumulator = Cusum(drift * unit)
            sums = accumulator.advance(accumulator.start(len(padded)), padded, counted)[1]
            largest = sums.amax(dim=1)
            threshold = self.threshold(largest, alpha, corpora)
            silent = (~((sums[topic] > threshold).cumsum(dim=1) > 0) & counted[topic]).sum(dim=1)
            delay = float((silent / counted[topic].sum(dim=1)).mean())
            if delay < best[0]:
                best = delay, largest / threshold
        return best[1]

    def threshold(self, statistic: Tensor, alpha: float, corpora: Collection[str] | None = None) -> float:
        """The least that keeps alpha in each of these corpora and at every length."""
        by_corpus: dict[str, list[float]] = {}
        by_length: dict[int, list[float]] = {}
        for place in self.places("calibration", self.retain if corpora is None else corpora):
            entry, value = self.reading.entries[place], float(statistic[place])
            by_corpus.setdefault(entry.corpus, []).append(value)
            by_length.setdefault(entry.length, []).append(value)
        return calibrate(by_corpus, Conformal(alpha), by_length=by_length).threshold

    def row(self, statistic: Tensor, alpha: float) -> Row:
        """Calibrate on all retain corpora, and count on what neither taught nor calibrated."""
        threshold = self.threshold(statistic, alpha)
        own, near = statistic[self.places("test", [self.name])], self.places("test", self.near)
        false = {name: rate_above(statistic[self.places("test", [name])].tolist(), threshold) for name in self.retain}
        return Row(
            (own > threshold).tolist(), (statistic[self.places("question", [self.name])] > threshold).tolist(),
            _auroc(own, statistic[self.places("test", self.retain)]), _auroc(own, statistic[near]) if near else None,
            {name: false[name] for name in self.retain if name in self.near},
            {name: false[name] for name in self.far},
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Which of the topic's test passages and questions are caught, AUROC against all and against the neighbours, and
    false positives of the near and the far corpora."""

    passages: Sequence[bool]
    questions: Sequence[bool]
    auroc: float
    auroc_near: float | None
    near: dict[str, Rate]
    far: dict[str, Rate]

    def line(self, *head: object, beside: Row | None = None) -> str:
        """In Markdown; with `beside`, how many passages and questions only this one and only that one catches."""
        cells = [
            *map(str, head), *(_rate(Rate(sum(its), len(its))) for its in (self.passages, self.questions)),
            f"{self.auroc:.3f}", "-" if self.auroc_near is None else f"{self.auroc_near:.3f}",
            _worst(self.near), _worst(self.far), "" if beside is None else self.against(beside),
        ]  # fmt: skip
        return f"| {' | '.join(cells)} |"

    def against(self, other: Row) -> str:
        """Texts caught by this gate alone, and by the other alone."""
        pairs = list(zip([*self.passages, *self.questions], [*other.passages, *other.questions], strict=True))
        return f"+{sum(a and not b for a, b in pairs)} -{sum(b and not a for a, b in pairs)}"


HEAD = ("passages", "questions", "AUROC", "AUROC near", "worst near", "worst far", "against the first")


def head(*first: str) -> str:
    """The table's head."""
    columns = [*first, *HEAD]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def averages(rows: Mapping[tuple[object, ...], Sequence[Row]], *first: str) -> str:
    """A table of what each way, named by its first cells, does over the topics: the share of passages and of questions
    caught, mean AUROC and the mean rate of the worst corpus."""
    columns = [*first, "topics", "passages", "questions", "AUROC", "worst corpus"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, its in rows.items():
        figures = [
            mean(hit for row in its for hit in row.passages), mean(hit for row in its for hit in row.questions),
            mean(row.auroc for row in its), mean(max(r.value for r in (row.near | row.far).values()) for row in its),
        ]  # fmt: skip
        lines.append(f"| {' | '.join([*map(str, name), str(len(its)), *(f'{value:.3f}' for value in figures)])} |")
    return "\n".join(lines)


def near_of(topic: str) -> tuple[str, ...]:
    """Its neighbours."""
    return NEAR.get(topic, ())


def scores(probe: Probe, hidden: Tensor) -> Tensor:
    """Token scores (tokens,)."""
    return torch.cat([probe.scores(block, block) for block in hidden.split(2**16)])


def kept(path: Path, learn: Callable[[], Probe]) -> Probe:
    """A probe from its file, or learned and put there."""
    if not path.exists():
        probe = learn()
        save_file({"weights": probe.weights, "bias": torch.tensor(probe.bias)}, path)
    found = load_file(path)
    return Probe(found["weights"], float(found["bias"]))


def _auroc(topic: Tensor, other: Tensor) -> float:
    return float(roc_auc_score(np.repeat([1, 0], [len(topic), len(other)]), torch.cat([topic, other]).numpy()))


def _rate(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.value:.2f} ({low:.2f} to {high:.2f})"


def _worst(rates: dict[str, Rate]) -> str:
    name, rate = max(rates.items(), key=lambda pair: pair[1].value, default=("", Rate(0, 0)))
    return f"{rate.value:.3f} ({name})" if name else "-"
