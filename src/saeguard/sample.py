"""The sampled windows, as the gates see them: activity of the selected features, and window means.

Held in memory for the bounded sample only: (tokens, n) booleans and one mean vector a window.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from saeguard.corpus import Split
from saeguard.detectors import LabelledTokens, LabelledWindows
from saeguard.gate import Gate, Probe, Scorer
from saeguard.longrun import Scored, read_scored
from saeguard.sae.slim import SlimEncoder
from saeguard.shards import SampledWindow, Shard
from saeguard.tokens import TokenMasks

FORGET = "forget"
NEAR_WEIGHT = 4.0


@dataclass(frozen=True)
class ReadWindow:
    """A sampled window after encoding: `activations` (tokens, n) of the selected features, masks (1, tokens),
    over the valid tokens the mean of the values at the hook point (d,) and the median norm of the residual stream."""

    corpus: str
    document: int
    split: Split
    length: int
    text: str
    ids: Tensor
    activations: Tensor
    masks: TokenMasks
    mean: Tensor
    norm: float
    shard: Shard
    index: int

    @property
    def key(self) -> tuple[str, int]:
        """The document it is cut from."""
        return self.corpus, self.document


@dataclass(frozen=True)
class ScoredWindow:
    """A window and its token scores."""

    window: ReadWindow
    text: Scored


def read_windows(shards: Iterable[Shard], encoder: SlimEncoder) -> list[ReadWindow]:
    """Encode every sampled window that has a valid token."""
    windows: list[ReadWindow] = []
    for shard in shards:
        for index, window in enumerate(shard.windows()):
            hidden = window.hidden[window.masks.valid[0]].float()
            if len(hidden):
                windows.append(_read(window, hidden, encoder, shard, index))
    return windows


def _read(window: SampledWindow, hidden: Tensor, encoder: SlimEncoder, shard: Shard, index: int) -> ReadWindow:
    return ReadWindow(
        corpus=window.corpus, document=window.document, split=window.split, length=window.length,
        text=window.text, ids=window.ids, activations=encoder(window.hidden), masks=window.masks,
        mean=hidden.mean(dim=0), norm=float(window.norms[window.masks.valid[0]].median()), shard=shard, index=index,
    )  # fmt: skip


def labelled_means(windows: Sequence[ReadWindow]) -> LabelledWindows:
    """Window means of the values at the hook point."""
    return LabelledWindows(
        x=torch.stack([window.mean for window in windows]).double().numpy(),
        forget=np.array([window.corpus == FORGET for window in windows]),
        corpus=[window.corpus for window in windows],
        document=[window.document for window in windows],
    )


def labelled_activity(windows: Sequence[ReadWindow], near: Collection[str] = ()) -> LabelledTokens:
    """Which selected features are active at each valid token; windows of the corpora `near` weigh `NEAR_WEIGHT`."""
    return _labelled(windows, [window.activations > 0 for window in windows], near)


def labelled_hidden(windows: Sequence[ReadWindow], near: Collection[str] = ()) -> LabelledTokens:
    """The values at the hook point at each valid token; windows of the corpora `near` weigh `NEAR_WEIGHT`."""
    return _labelled(windows, _hidden(windows), near)


def _labelled(windows: Sequence[ReadWindow], values: Sequence[Tensor], near: Collection[str]) -> LabelledTokens:
    kept = [its[window.masks.valid[0]] for window, its in zip(windows, values, strict=True)]
    return LabelledTokens(
        torch.cat(kept), torch.tensor([len(its) for its in kept]), torch.tensor([w.corpus == FORGET for w in windows]),
        np.array([NEAR_WEIGHT if window.corpus in near else 1.0 for window in windows]),
    )  # fmt: skip


def scored(gate: Gate, windows: Sequence[ReadWindow]) -> list[ScoredWindow]:
    """The token scores of each window, by the code that serves. They are the same whatever accumulates them."""
    return [
        ScoredWindow(
            window,
            Scored(*(part[0] for part in gate.scored(stream[None], (window.activations > 0)[None], window.masks))),
        )
        for window, stream in zip(windows, _streams(gate.scorer, windows), strict=True)
    ]


def trajectories(gate: Gate, windows: Sequence[ScoredWindow]) -> list[Tensor]:
    """The gate statistic (tokens,) after each token of each window."""
    return [read_scored(gate.accumulator, window.text) for window in windows]


def statistics(gate: Gate, read: Sequence[Tensor]) -> list[float]:
    """The gate statistic of each window, from its trajectory."""
    return [float(gate.sequence_statistic(after[None])) for after in read]


def delay(gate: Gate, threshold: float, read: Sequence[Tensor]) -> float:
    """Mean share of a window that has passed before it triggers; 1 for a window that never does."""
    nothing = torch.zeros(1, dtype=torch.bool)
    return mean(float((~gate.decide(after[None], threshold, nothing)).double().mean()) for after in read)


def mean_score(scorer: Scorer, windows: Sequence[ReadWindow]) -> float:
    """Mean score of a counted token of these windows."""
    scores = [
        scorer.scores(stream, window.activations > 0)[window.masks.valid[0]]
        for window, stream in zip(windows, _streams(scorer, windows), strict=True)
    ]
    return float(torch.cat(scores).mean())


def _streams(scorer: Scorer, windows: Sequence[ReadWindow]) -> list[Tensor]:
    """The residual streams where the scorer looks at them; else the activations stand in, unread."""
    return _hidden(windows) if isinstance(scorer, Probe) else [window.activations for window in windows]


def _hidden(windows: Sequence[ReadWindow]) -> list[Tensor]:
    """The residual streams of these windows, read from their shards again (one shard in memory at a time)."""
    wanted: dict[Shard, dict[int, int]] = {}
    for place, window in enumerate(windows):
        wanted.setdefault(window.shard, {})[window.index] = place
    found: dict[int, Tensor] = {}
    for shard, places in wanted.items():
        for index, sampled in enumerate(shard.windows()):
            if index in places:
                found[places[index]] = sampled.hidden
    return [found[place] for place in range(len(windows))]
