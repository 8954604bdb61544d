"""The guard of one layer as a single operator of fixed shapes, for `torch.compile` and CUDA graphs.

A graph replays kernels, not Python. So whose rows these are stands in buffers that are filled before each pass, what is
remembered is updated in place, and nothing depends on a value read back. Scores, masks and clamp are those of `gate`
and `clamp`. Only what goes along the tokens is written again, as a scan over spans of rows: the sum or the CUSUM after
each row is that of the row and of the rows of its span before it. It equals `guard.LayerGuard` by test.

Tested compiled on a CPU. It has not been captured on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from saeguard.errors import AttachError, NonFiniteError
from saeguard.gate import NOTHING_READ, Accumulator, Mean
from saeguard.rule import Rule
from saeguard.serving.vllm.guard import LayerGuard
from saeguard.serving.vllm.memory import NEVER, RuleMemory
from saeguard.serving.vllm.slots import NOBODY, Span
from saeguard.tokens import TokenMasks, token_masks

Parts = tuple[Tensor, ...]
_GUARDS: WeakValueDictionary[int, GraphGuard] = WeakValueDictionary()
_KEYS = count()


class GraphGuard(LayerGuard):
    """A `LayerGuard` that acts through `torch.ops.saeguard.guard(stream, guard.key)` on at most `tokens` rows.

    Rows that were not announced belong to nobody and stay as they are, so that warming up and capturing change nothing.
    That a pass went through the layer, and that it was finite, is checked when the next one is announced.
    """

    def __init__(
        self, layer: int, rules: Mapping[str, Rule], special: Sequence[int], *,
        slots: int, device: torch.device, tokens: int,
    ) -> None:  # fmt: skip
        super().__init__(layer, rules, special, slots=slots, device=device)
        self.key = next(_KEYS)
        _GUARDS[self.key] = self
        self._rows = torch.zeros(4, tokens, dtype=torch.int64, device=device)
        self._masks = torch.zeros(3, tokens, dtype=torch.bool, device=device)
        self._seen = torch.zeros(2, dtype=torch.int64, device=device)
        self._announced = 0

    def begin(self, spans: Sequence[Span], ids: Tensor) -> None:
        """Fill the buffers. Raises `AttachError` or `NonFiniteError` for the pass before."""
        self._check()
        self._forget([span.slot for span in spans if span.position == 0])
        rows = _rows(spans).to(ids.device)
        self._rows[:, : len(ids)] = rows
        attended = torch.ones_like(ids, dtype=torch.bool)[:, None]
        masks = token_masks(ids[:, None], attended, self.special, started=rows[2] > 0)
        for buffer, mask in zip(self._masks, (masks.attended, masks.first, masks.valid), strict=True):
            buffer[: len(ids)] = mask[:, 0]
        self._announced += 1

    def end(self) -> None:
        """Give all rows back to nobody."""
        self._rows.zero_()
        self._masks.zero_()

    def guard(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream (tokens, d_model) as it shall be, and the rows (tokens,) changed."""
        slot, offset, position, target = self._rows[:, : len(stream)]
        masks = TokenMasks(*self._masks[:, None, : len(stream)])
        owned = slot != NOBODY
        finite = stream.sum(dim=-1, dtype=torch.float32).isfinite()
        self._seen += torch.stack([owned.any(), (owned & ~finite).any()])
        change, where = torch.zeros_like(stream, dtype=torch.float32), torch.zeros_like(owned)
        for memory in self.memories.values():
            a = memory.encoder(stream)
            triggered = _read(memory, stream, a, masks, (slot, offset, position, target))
            if memory.rule.clamps:
                clamped = memory.hot((a > 0)[None], masks)[0] & triggered & owned
                change = change + torch.where(clamped[:, None], memory.delta(a), 0.0)
                where = where | clamped
        return torch.where(where[:, None], (stream + change).to(stream.dtype), stream), where

    def _check(self) -> None:
        passes, broken = self._seen.tolist()
        if passes != self._announced:
            raise AttachError(f"a step ran without its layer {self.layer}: nothing was guarded")
        if broken:
            raise NonFiniteError(f"the residual stream after layer {self.layer} holds NaN or infinite values")


@torch.library.custom_op("saeguard::guard", mutates_args=())
def guard_op(stream: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """`GraphGuard.guard` of the guard with that key."""
    return _GUARDS[key].guard(stream)


@guard_op.register_fake
def _(stream: Tensor, key: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(stream), stream.new_empty(stream.shape[0], dtype=torch.bool)


def _rows(spans: Sequence[Span]) -> Tensor:
    """(4, tokens): slot, place in its span, position in its sequence, and the slot again at the last row of a span."""
    columns = torch.tensor([(span.slot, span.length, span.position) for span in spans])
    slot, length, position = columns.repeat_interleave(columns[:, 1], dim=0).unbind(dim=1)
    offset = torch.cat([torch.arange(span.length) for span in spans])
    return torch.stack([slot, offset, position + offset, torch.where(offset == length - 1, slot, NOBODY)])


def _read(memory: RuleMemory, stream: Tensor, a: Tensor, masks: TokenMasks, rows: Parts) -> Tensor:
    """Advance the memory by all rows; which of them (tokens,) are clamped if they are hot."""
    slot, offset, position, target = rows
    gate, active = memory.gate, (a > 0)[None]
    scores = gate.scorer.scores(stream[None], active & gate.eligible(masks)[..., None])[0]
    counted = (masks.valid if gate.counts == "valid" else masks.attended)[0]
    state, statistics = advance(gate.accumulator, memory.state[slot], scores, counted, offset)
    over = triggered = statistics > memory.rule.threshold
    if gate.latch:
        (ever,) = scan((over,), offset, lambda before, here: (before[0] | here[0],))
        triggered = ever | memory.triggered[slot]
    memory.state[target], memory.triggered[target] = state, triggered
    memory.statistic.scatter_reduce_(0, slot, statistics, "amax")
    memory.first.scatter_reduce_(0, slot, torch.where(over, position, NEVER), "amin")
    memory.counts.index_add_(0, slot, (active & masks.valid[..., None])[0].long())
    return memory.triggered[slot] if memory.rule.reaches_back else triggered


def advance(
    accumulator: Accumulator, state: Tensor, scores: Tensor, counted: Tensor, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """`Accumulator.advance` for rows of many spans: state (tokens, s) and statistic (tokens,) after each row.

    `state` (tokens, s) is what each row's span began with, `offset` (tokens,) the place of a row in its span.
    """
    if isinstance(accumulator, Mean):
        steps = (torch.where(counted, scores, 0.0), counted.double())
        sums = scan(steps, offset, lambda before, here: (before[0] + here[0], before[1] + here[1]))
        total, number = (state + torch.stack(sums, dim=-1)).unbind(dim=-1)
        return torch.stack([total, number], dim=-1), torch.where(number > 0, total / number, NOTHING_READ)
    steps = (torch.where(counted, scores - accumulator.drift, 0.0), torch.zeros_like(scores))
    walk, floor = scan(steps, offset, _after)
    s = (state[:, 0] + walk).maximum(floor)
    return s[:, None], s


def _after(before: Parts, here: Parts) -> Parts:
    """The map S -> max(S + walk, floor) of some rows and then of others, as one such map."""
    return before[0] + here[0], (before[1] + here[0]).maximum(here[1])


def scan(parts: Parts, offset: Tensor, combine: Callable[[Parts, Parts], Parts]) -> Parts:
    """For each row, all rows of its span up to it combined, in log2(rows) passes (Hillis and Steele 1986)."""
    distance = 1
    while distance < len(offset):
        inside = offset >= distance
        before = tuple(part.roll(distance, 0) for part in parts)
        together = combine(before, parts)
        parts = tuple(torch.where(inside, new, old) for new, old in zip(together, parts, strict=True))
        distance *= 2
    return parts
