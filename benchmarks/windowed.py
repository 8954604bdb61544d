"""Windowed maxima beside the CUSUM: do they catch more at the same promise, and how do they do in long text?

    python benchmarks/windowed.py DATA_FOLDER [--work DIR] [--topics astronomy ...] [--alphas 0.01 0.05]

DATA_FOLDER and DIR as in `gates.py`, whose topics, passages, streams and questions these are. On the token scores of
density, evidence and probe, each statistic with a threshold that keeps the same promise:

    CUSUM             as in `fit`, the drift that triggers soonest on calibration forget text
    CUSUM, most       the drift that catches most of calibration forget text
    only 16, only 32  the sum of the last 16 (32) counted scores
    one, chosen       of 8, 16, 32 and 64, chosen as the drift is
    8 to 64           the largest of the four sums, each in units of its deviation in retain text
    8 to 64, bounds   the same, each in units of the threshold that it would have alone
    8 to 32, bounds   the same without the length that most passages do not reach

The threshold is found as every other: from the largest statistic in each retain sequence, so by the distribution of the
maximum itself. Paired figures are texts that only this one catches (+) and that only the CUSUM catches (-). *Alarms,
equal* are those where the threshold is moved to catch as many test passages as the CUSUM does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import torch
from gates import judge, line, parser_of, read_everything, read_topic
from gates_paired import PAIRED, Row, against, alarms, caught, table
from gates_streams import FILLERS, Piece
from torch import Tensor
from torch.nn.functional import pad

from saeguard.calibration import Conformal, Method
from saeguard.config import PRESETS
from saeguard.evidence import GateResult, evaluate_gate
from saeguard.gate import Cusum, Gate, Scorer
from saeguard.gates import DRIFTS, Splits, fit_gates, soonest
from saeguard.sae.slim import SlimEncoder
from saeguard.sample import FORGET, ScoredWindow, mean_score, scored, trajectories

LENGTHS = (8, 16, 32, 64)
FIRST = "CUSUM"
Case = tuple[str, float, str]
"""Token scores, alpha and statistic."""


@dataclass(frozen=True)
class Windowed:
    """The largest of the sums of the last so many counted scores less `ordinary`, each divided by its unit.

    State: the last of them, as many as the longest sum has, zeros before the first: what was not read is ordinary.
    """

    units: Mapping[int, float]
    ordinary: float

    def start(self, batch: int) -> Tensor:
        """The state (batch, longest) of sequences of which nothing was read."""
        return torch.zeros(batch, max(self.units), dtype=torch.float64)

    def advance(self, state: Tensor, scores: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """State (batch, tokens, longest) and statistic (batch, tokens) after each token."""
        longest, tokens = state.shape[1], scores.shape[1]
        read = counted.cumsum(dim=1)
        places = torch.where(counted, longest + read - 1, longest + tokens)  # the last place is cut off again
        known = pad(state, (0, tokens + 1)).scatter(1, places, (scores - self.ordinary).double())[:, :-1]
        states = known.unfold(1, longest, 1).gather(1, read[..., None].expand(-1, -1, longest))
        sums = [states[..., -length:].sum(dim=-1) / unit for length, unit in self.units.items()]
        return states, torch.stack(sums).amax(dim=0)

    def of_block(self, statistics: Tensor) -> Tensor:
        """The statistic (batch,) of a whole block: the largest in it."""
        return statistics.amax(dim=1)


@dataclass(frozen=True)
class Timed(Row):
    """With what `judge` found at the threshold that catches as many passages as the CUSUM; after how many counted
    tokens each test passage triggers, None where it does not, and the mean share read before."""

    equal: Mapping[str, Any]
    first: Sequence[int | None]
    delay: float


@dataclass(frozen=True)
class Bench:
    """A topic's token scores by one scorer: how they are accumulated, and what comes of it."""

    scorer: Scorer
    unit: float
    calibration: Sequence[ScoredWindow]
    test: Sequence[ScoredWindow]

    @classmethod
    def of(cls, scorer: Scorer, splits: Splits) -> Bench:
        """From the windows of a topic."""
        unit = mean_score(scorer, [window for window in splits.fit if window.corpus == FORGET])
        return cls(scorer, unit, *(scored(Gate(scorer), its) for its in (splits.calibration, splits.test)))

    def results(self, method: Method) -> dict[str, GateResult]:
        """The calibrated gate of every statistic, the CUSUM first."""
        ordinary, deviations = self._retain()
        cusums = [self._calibrated(Cusum(drift * self.unit), method) for drift in DRIFTS]
        alone = {length: self._calibrated(Windowed({length: 1.0}, ordinary), method) for length in LENGTHS}
        bounds = {length: result.threshold for length, result in alone.items()}
        reached = {length: bound for length, bound in bounds.items() if length < LENGTHS[-1]}
        joined = {"8 to 64": deviations, "8 to 64, bounds": bounds, "8 to 32, bounds": reached}
        return {
            FIRST: soonest(cusums),
            "CUSUM, most": max(cusums, key=lambda result: result.caught_in_calibration.value),
            "only 16": alone[16],
            "only 32": alone[32],
            "one, chosen": soonest(alone.values()),
        } | {name: self._calibrated(Windowed(units, ordinary), method) for name, units in joined.items()}

    def _calibrated(self, accumulator: Any, method: Method) -> GateResult:
        return evaluate_gate(Gate(self.scorer, accumulator), method, self.calibration, self.test)

    def _retain(self) -> tuple[float, dict[int, float]]:
        """The mean score in retain text, and the deviation of the sums of each length; every corpus weighs the same."""
        texts: dict[str, list[Tensor]] = {}
        for each in self.calibration:
            if each.window.corpus != FORGET:
                texts.setdefault(each.window.corpus, []).append(each.text.scores[each.text.counted])
        corpora = [torch.cat(its) for its in texts.values()]
        ordinary = mean(float(its.mean()) for its in corpora)
        squares = {
            length: mean(float((its - ordinary).unfold(0, length, 1).sum(dim=-1).square().mean()) for its in corpora)
            for length in LENGTHS
        }
        return ordinary, {length: math.sqrt(square) for length, square in squares.items()}

    def triggers(self, result: GateResult) -> list[tuple[int, int]]:
        """Of each test passage of the topic, the counted tokens before it triggers, and of the whole."""
        own = [each for each in self.test if each.window.corpus == FORGET]
        found = []
        for each, after in zip(own, trajectories(result.gate, own), strict=True):
            quiet = (after > result.threshold).cumsum(dim=0) == 0
            found.append((int((quiet & each.text.counted).sum()), int(each.text.counted.sum())))
        return found


def rows_of(
    bench: Bench, method: Method, encoder: SlimEncoder, streams: Mapping[str, Sequence[Piece]], topic: str
) -> Iterator[tuple[str, Timed]]:
    """The row of every statistic."""
    results = bench.results(method)
    for name, result in results.items():
        before = bench.triggers(result)
        yield (
            name,
            Timed(
                judge(result, encoder, streams, topic),
                [quiet < tokens for quiet, tokens in before],
                judge(catching(result, results[FIRST].caught.hits), encoder, streams, topic),
                [quiet + 1 if quiet < tokens else None for quiet, tokens in before],
                mean(quiet / tokens for quiet, tokens in before),
            ),
        )


def catching(result: GateResult, hits: int) -> GateResult:
    """The same gate with the threshold that catches so many of the test passages, fewer where some are equal."""
    ranked = sorted(result.forget, reverse=True)
    threshold = ranked[hits] if hits < len(ranked) else -math.inf
    return replace(result, calibration=replace(result.calibration, threshold=threshold))


def averages(rows: Mapping[Case, Sequence[Timed]]) -> str:
    """Means over the topics of shares and rates, and the sums of what is caught by one alone."""
    columns = [
        "scores", "alpha", "statistic", "passages", "AUROC", "worst corpus", "alarms/1000", "worst alarms/1000",
        *(f"after {filler}" for filler in FILLERS), "read before", "tokens later", "alarms, equal", "worst, equal",
        *(f"paired, {which}" for which in PAIRED),
    ]  # fmt: skip
    lines = []
    for (scores, alpha, name), its in rows.items():
        first = rows[scores, alpha, FIRST]
        figures = [
            caught(its, "passages"), mean(row.found["auroc"] for row in its), mean(row.worst for row in its),
            *alarms([row.found for row in its]), *(caught(its, str(filler)) for filler in FILLERS),
            mean(row.delay for row in its), later(its, first), *alarms([row.equal for row in its]),
        ]  # fmt: skip
        paired = ["" if name == FIRST else against(its, first, which) for which in PAIRED]
        lines.append([scores, alpha, name, *(f"{figure:.3f}" for figure in figures), *paired])
    return table(columns, lines)


def later(rows: Sequence[Timed], others: Sequence[Timed]) -> float:
    """By how many counted tokens these trigger later than the others, in the mean of passages that both catch."""
    pairs = [pair for a, b in zip(rows, others, strict=True) for pair in zip(a.first, b.first, strict=True)]
    return mean([a - b for a, b in pairs if a is not None and b is not None] or [0])


def cost(accumulator: Any, tokens: int = 256) -> tuple[int, float, float]:
    """Numbers in the state of a sequence, and microseconds a token one by one and with `tokens` at once."""
    scores, counted, state = torch.zeros(1, tokens).double(), torch.ones(1, tokens).bool(), accumulator.start(1)
    started = time.perf_counter()
    for place in range(tokens):
        accumulator.advance(state, scores[:, place : place + 1], counted[:, place : place + 1])
    between = time.perf_counter()
    for _ in range(tokens):
        accumulator.advance(state, scores, counted)
    singly, at_once = between - started, (time.perf_counter() - between) / tokens
    return state.shape[1], 1e6 * singly / tokens, 1e6 * at_once / tokens


def main() -> None:
    """Read, fit, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--per-1000", type=float)
    args = parser.parse_args()
    books, shards, streams = read_everything(args.data, args.work)
    rows: dict[Case, list[Timed]] = {}
    for topic in args.topics or books:
        own: dict[Case, list[Timed]] = {}
        encoder, splits = read_topic(shards, topic)
        config = PRESETS["default"]
        for scores, gate in fit_gates(splits, config, forget=True).items():
            bench = Bench.of(gate.gate.scorer, splits)
            for alpha in args.alphas:
                for name, row in rows_of(bench, Conformal(alpha, args.per_1000), encoder, streams, topic):
                    print(line(row.found | {"topic": topic, "alpha": alpha, "gate": f"{scores}, {name}"}), flush=True)
                    own[scores, alpha, name] = [row]
                    rows.setdefault((scores, alpha, name), []).append(row)
        print(f"\n{topic}\n\n{averages(own)}\n", flush=True)
    print(f"all\n\n{averages(rows)}\n")
    for name, accumulator in {FIRST: Cusum(1.0), "8 to 64": Windowed(dict.fromkeys(LENGTHS, 1.0), 0.0)}.items():
        numbers, singly, at_once = cost(accumulator)
        print(f"{name}: state of {numbers}, {singly:.0f} us a token, {at_once:.2f} us in a block")


if __name__ == "__main__":
    main()
