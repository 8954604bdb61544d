"""Reading sequences again: what a pass needs so that a trigger reaches back to tokens that a cache already holds.

The cache gets the keys and values of the second reading in the rows concerned, and the output of the pass that
triggered its values at the tokens from the trigger on. What came out before the trigger stays as it was read.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from saeguard.errors import AttachError
from saeguard.online.sequences import TRACKS, UNSAID, Track, remember_rows

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
KEPT = ("output_hidden_states", "return_dict")


@dataclass(frozen=True)
class Reading:
    """What a pass of `module` was given (`inputs` by name), whose rows may be read again."""

    module: nn.Module
    inputs: Mapping[str, Any]

    @property
    def ids(self) -> Tensor:
        """The tokens (batch, tokens) that come."""
        ids: Tensor = self.inputs["input_ids"]
        return ids

    @property
    def cache(self) -> Cache | None:
        """The cache that it was given."""
        kv = self.inputs.get("past_key_values")
        return kv if isinstance(kv, Cache) else None

    @property
    def tokens(self) -> int:
        """How many tokens come."""
        return self.ids.shape[1]

    @property
    def positions(self) -> Tensor:
        """The positions (batch, tokens) that it gave, `UNSAID` where it gave none."""
        ids, given = self.ids, self.inputs.get("position_ids")
        if not isinstance(given, Tensor) or given.dim() != 2:
            return torch.full_like(ids, UNSAID)
        return given.to(ids.device).expand_as(ids)

    @property
    def wants_only_the_last(self) -> bool:
        """Whether nothing but what comes after the last token is looked at."""
        keep = self.inputs.get("logits_to_keep")
        return self.tokens == 1 or (isinstance(keep, int) and keep == 1 and not self.inputs.get("output_hidden_states"))

    def again(self, track: Track, cache: Cache | None) -> Any:
        """Read all that a track holds, into an empty cache; the output is of the places that the pass kept."""
        options = {name: self.inputs[name] for name in KEPT if self.inputs.get(name) is not None}
        parameters = inspect.signature(type(self.module).forward).parameters
        if "logits_to_keep" in parameters:
            options["logits_to_keep"] = track.length - self.tokens + self._kept(track.ids.device)
        if (positions := _positions(track)) is not None:
            options["position_ids"] = positions
        return self.module(
            input_ids=track.ids, attention_mask=track.attended.long(), past_key_values=cache,
            use_cache=cache is not None, **options,
        )  # fmt: skip

    def mixed(self, output: Any, other: Any, rows: Tensor, where: Tensor) -> Any:
        """The output of the pass, with that of the second reading in `rows` (k,) at the tokens `where` (k, tokens)."""
        kept = where[:, self._kept(where.device)]

        def mix(mine: Any, theirs: Any) -> Any:
            if isinstance(mine, tuple):
                return tuple(mix(a, b) for a, b in zip(mine, theirs, strict=True))
            if not isinstance(mine, Tensor) or mine.dim() != 3:
                return mine
            here = kept if mine.shape[1] == kept.shape[1] else where
            new = torch.where(here.to(mine.device)[..., None], theirs[:, -mine.shape[1] :], mine[rows.to(mine.device)])
            return mine.index_copy(0, rows.to(mine.device), new)

        if isinstance(output, tuple):
            return mix(output, other)
        for name, value in list(output.items()):
            output[name] = mix(value, other.get(name))
        if self.inputs.get("labels") is not None and output.get("loss") is not None:
            vocabulary = output["logits"].shape[-1]
            loss: Any = self.module.loss_function
            output["loss"] = loss(logits=output["logits"], labels=self.inputs["labels"], vocab_size=vocabulary)
        return output

    def _kept(self, device: torch.device) -> Tensor:
        """Which tokens of the pass its logits are of."""
        keep = self.inputs.get("logits_to_keep")
        tokens = torch.arange(self.tokens, device=device)
        if isinstance(keep, Tensor):
            return tokens[keep.to(device)]
        return tokens[-keep:] if keep else tokens


def check_rereadable(cache: Cache) -> None:
    """Raises `AttachError` for a cache whose rows cannot be put in the place of others."""
    other = next((type(layer).__name__ for layer in cache.layers if type(layer) not in PLAIN), None)
    if other is None and getattr(cache, "offloading", False):
        other = "offloaded layers"
    if other is not None:
        raise AttachError.mismatch(
            "cache of a guardrail that clamps what was read before a trigger", found=other,
            expected="keys and values as they are, all of them or of a window, dynamic or static",
            fix="Use a DynamicCache or StaticCache, or fit with --reach onward.",
        )  # fmt: skip


def emptied(cache: Cache) -> Cache:
    """A cache of the same kind with nothing in it, and no track."""
    fresh = copy.copy(cache)
    fresh.layers = [_emptied(layer) for layer in cache.layers]
    if hasattr(fresh, TRACKS):
        setattr(fresh, TRACKS, {})
    return fresh


def put_rows(cache: Cache, rows: Tensor, other: Cache) -> None:
    """Put the rows of another cache of equal length in the place of these `rows` (k,), with what is known of them."""
    remember_rows(cache, rows, other)
    layers: Any = zip(cache.layers, other.layers, strict=True)
    for mine, theirs in layers:
        index, in_place = rows.to(mine.keys.device), isinstance(mine, StaticLayer)
        if in_place:
            mine.keys[index], mine.values[index] = theirs.keys, theirs.values
        else:
            held = mine.keys.shape[-2]  # a window that can be cropped holds more than the window for a while
            mine.keys = mine.keys.index_copy(0, index, theirs.keys[..., -held:, :])
            mine.values = mine.values.index_copy(0, index, theirs.values[..., -held:, :])


def _emptied(layer: Any) -> Any:
    fresh = copy.copy(layer)
    fresh.keys = fresh.values = None
    fresh.is_initialized = False
    for name, count in vars(layer).items():
        if name.startswith("cumulative_length"):
            setattr(fresh, name, torch.zeros_like(count) if isinstance(count, Tensor) else 0)
    return fresh


def _positions(track: Track) -> Tensor | None:
    """The positions as they were given; where some were not, the model's own way to count: from 0, padding included."""
    said = track.positions != UNSAID
    if not bool(said.any()):
        return None
    return torch.where(said, track.positions, torch.arange(track.length, device=said.device))
