"""What a guard remembers of each sequence, and how it follows the sequence through a KV cache.

A `Track` holds, for each row of a batch, what the gate knew after each token. It travels on the cache object
itself: when transformers reorders beams, repeats rows, takes tokens back (assisted decoding) or starts over, the
track does the same; a deep copy of the cache carries a copy of the track.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as memoize
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from saeguard.errors import AttachError
from saeguard.gate import NOTHING_READ

TRACKS = "_saeguard_tracks"
UNSAID = -1


@dataclass(frozen=True)
class RuleTrack:
    """One rule's record: gate state (batch, tokens, s), statistic and triggered (batch, tokens) after each token, and
    `clamped` (batch, tokens): whether the cache holds the token as the rule's clamp leaves it, were it hot."""

    states: Tensor
    statistics: Tensor
    triggered: Tensor
    clamped: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> RuleTrack:
        """The same change of rows or tokens on every part."""
        return RuleTrack(*(change(part) for part in vars(self).values()))


@dataclass(frozen=True)
class Track:
    """A batch's record: `ids`, `positions` (`UNSAID` where the model was given none) and `attended` (batch, tokens),
    `active` (batch, tokens, n) at valid tokens, and each rule's."""

    ids: Tensor
    positions: Tensor
    attended: Tensor
    active: Tensor
    rules: tuple[RuleTrack, ...]

    @property
    def started(self) -> Tensor:
        """Which rows (batch,) have had a token."""
        return self.attended.any(dim=1)

    @property
    def at_the_start(self) -> Tensor:
        """Which rules (batch, rules) had triggered with the first token."""
        first = self.attended.int().argmax(dim=1, keepdim=True)
        return torch.cat([rule.triggered.gather(1, first.to(rule.triggered.device)) for rule in self.rules], dim=1)

    @property
    def length(self) -> int:
        """Positions recorded, padding included."""
        return self.attended.shape[1]

    def map(self, change: Callable[[Tensor], Tensor]) -> Track:
        """The same change of rows or tokens on every part."""
        ids, positions, attended, active = (change(part) for part in self._parts())
        return Track(ids, positions, attended, active, tuple(rule.map(change) for rule in self.rules))

    def of(self, rows: Tensor) -> Track:
        """The record of some rows (k,)."""
        return self.map(lambda part: part[rows.to(part.device)])

    def first(self, tokens: int) -> Track:
        """The record of the first `tokens` positions."""
        return self if tokens >= self.length else self.map(lambda part: part[:, :tokens])

    def padded(self, length: int) -> Track:
        """The record with padding on the left, up to `length` positions."""
        gap = length - self.length
        if gap == 0:
            return self
        pad = torch.nn.functional.pad
        rules = (
            RuleTrack(
                pad(rule.states, (0, 0, gap, 0)),
                pad(rule.statistics, (gap, 0), value=NOTHING_READ),
                pad(rule.triggered, (gap, 0)),
                pad(rule.clamped, (gap, 0)),
            )
            for rule in self.rules
        )
        ids, positions, attended = (pad(part, (gap, 0)) for part in (self.ids, self.positions, self.attended))
        return Track(ids, positions, attended, pad(self.active, (0, 0, gap, 0)), tuple(rules))

    def beside(self, other: Track) -> Track:
        """The rows of this record and then those of the other, of the same length."""
        return self._joined(other, dim=0)

    def followed_by(self, other: Track) -> Track:
        """This record and then the other, along the tokens."""
        return self._joined(other, dim=1)

    def with_rows(self, rows: Tensor, other: Track) -> Track:
        """This record with those of another, of the same length, in the place of `rows` (k,)."""
        index = torch.arange(len(self.ids), device=rows.device).index_copy(
            0, rows, len(self.ids) + torch.arange(len(rows), device=rows.device)
        )
        return self.beside(other).of(index)

    def _joined(self, other: Track, dim: int) -> Track:
        pairs = zip(self._parts(), other._parts(), strict=True)
        ids, positions, attended, active = (torch.cat(pair, dim=dim) for pair in pairs)
        rules = (
            RuleTrack(*(torch.cat(pair, dim=dim) for pair in zip(vars(a).values(), vars(b).values(), strict=True)))
            for a, b in zip(self.rules, other.rules, strict=True)
        )
        return Track(ids, positions, attended, active, tuple(rules))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.ids, self.positions, self.attended, self.active


class FollowedCache:
    """Mixed into the class of a cache: what happens to its rows happens to the tracks."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As in transformers; the tracks follow."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        _replace_tracks(self, lambda track: track.map(lambda part: part.index_select(0, beam_idx.to(part.device))))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As in transformers; the tracks follow."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        _replace_tracks(self, lambda track: track.map(lambda part: part.repeat_interleave(repeats, dim=0)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """As in transformers; the tracks follow."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        _replace_tracks(self, lambda track: track.of(indices))

    def crop(self, tokens_to_remove: int) -> None:
        """As in transformers; the tracks are cut to the same length."""
        super().crop(tokens_to_remove)  # type: ignore[misc]
        past = int(self.get_seq_length())  # type: ignore[attr-defined]
        _replace_tracks(self, lambda track: track.first(past))

    def reset(self) -> None:
        """As in transformers; the tracks are forgotten here, not by those who still look at them."""
        super().reset()  # type: ignore[misc]
        setattr(self, TRACKS, {})


def _replace_tracks(cache: Any, change: Callable[[Track], Track]) -> None:
    tracks: dict[str, Track] = getattr(cache, TRACKS)
    tracks.update({key: change(track) for key, track in tracks.items()})


@memoize
def _followed(kind: type) -> type:
    return type(f"Followed{kind.__name__}", (FollowedCache, kind), {})


def remember(cache: Cache, key: str, track: Track) -> dict[str, Track]:
    """Put a track on a cache, which from then on it follows; all tracks there."""
    if not isinstance(cache, FollowedCache):
        cache.__class__ = _followed(type(cache))  # type: ignore[arg-type]
        setattr(cache, TRACKS, {})
    tracks: dict[str, Track] = getattr(cache, TRACKS)
    tracks[key] = track
    return tracks


def remember_rows(cache: Cache, rows: Tensor, other: Cache) -> None:
    """Put the tracks on another cache, of equal length, in the place of `rows` (k,) of those on this one."""
    tracks: dict[str, Track] = getattr(cache, TRACKS, {})
    found: dict[str, Track] = getattr(other, TRACKS, {})
    tracks.update({key: tracks[key].with_rows(rows, track) for key, track in found.items()})


def recall(cache: Cache | None, key: str, batch: int) -> Track | None:
    """The track of the tokens that are in the cache, or None for an empty one.

    Raises `AttachError` for a cache that was filled without this guard: its tokens went by unseen.
    """
    past = 0 if cache is None else int(cache.get_seq_length())
    if cache is None or past == 0:
        return None
    track: Track | None = getattr(cache, TRACKS, {}).get(key)
    if track is None or track.length != past:
        seen = "" if track is None else f", of which it has seen {track.length}"
        raise AttachError(
            f"the cache holds {past} tokens that this guardrail has not seen{seen}. Start the conversation with the "
            "guardrail attached, or pass the whole text without the cache."
        )
    if len(track.attended) != batch:
        raise AttachError.mismatch(
            "rows of the cache and of the input", found=batch, expected=len(track.attended),
            fix="Expand a cache with its own methods (batch_repeat_interleave, batch_select_indices).",
        )  # fmt: skip
    return track


def new_cache() -> Cache:
    """An empty cache that keeps every key and value of every layer, so that its rows can be padded and joined."""
    return DynamicCache()


def check_joinable(cache: Cache) -> None:
    """Raises `AttachError` for a filled cache with a layer that keeps anything but all keys and values."""
    other = next((type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer), None)
    if other is not None or not cache.layers:
        raise AttachError.mismatch(
            "cache of a model whose sequences are written together", found=other or "none",
            expected="all keys and values of every layer", fix="This model cannot be served here.",
        )  # fmt: skip


def join(cache: Cache, other: Cache) -> None:
    """Put the rows of `other` below those of `cache`, the shorter one padded on the left; the tracks follow.

    Both are joinable.
    """
    length = max(int(one.get_seq_length()) for one in (cache, other))
    layers: Sequence[tuple[Any, Any]] = list(zip(cache.layers, other.layers, strict=True))
    for mine, theirs in layers:
        mine.keys = torch.cat([_padded(mine.keys, length), _padded(theirs.keys, length)])
        mine.values = torch.cat([_padded(mine.values, length), _padded(theirs.values, length)])
    tracks: dict[str, Track] = getattr(cache, TRACKS, {})
    for key, track in tracks.items():
        tracks[key] = track.padded(length).beside(getattr(other, TRACKS)[key].padded(length))


def cut_left(cache: Cache, positions: int) -> None:
    """Forget the first positions of a cache, which are padding in every row; the tracks follow."""
    if positions == 0:
        return
    layers: Sequence[Any] = cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys[:, :, positions:], layer.values[:, :, positions:]
    if isinstance(cache, FollowedCache):
        _replace_tracks(cache, lambda track: track.map(lambda part: part[:, positions:]))


def _padded(values: Any, length: int) -> Tensor:
    """Keys or values (rows, heads, positions, width), with zeros on the left up to `length` positions."""
    return torch.nn.functional.pad(values, (0, 0, length - values.shape[2], 0))
