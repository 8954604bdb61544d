"""Tracks follow the rows and tokens of a cache."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import Cache, DynamicCache

from saeguard.errors import AttachError
from saeguard.online.sequences import RuleTrack, Track, recall, remember


def track(batch: int, tokens: int) -> Track:
    numbers = torch.arange(batch * tokens).view(batch, tokens)
    rule = RuleTrack(numbers[..., None].double(), numbers.double(), numbers > 3, numbers > 3)
    return Track(numbers, numbers, numbers >= 0, numbers[..., None] % 2 == 0, (rule,))


def filled(batch: int, tokens: int) -> tuple[DynamicCache, Track]:
    """A cache of that many rows and tokens, and its track."""
    cache = DynamicCache()
    cache.update(torch.zeros(batch, 1, tokens, 2), torch.zeros(batch, 1, tokens, 2), 0)
    remember(cache, "key", track(batch, tokens))
    return cache, track(batch, tokens)


def recalled(cache: Cache, batch: int) -> torch.Tensor:
    found = recall(cache, "key", batch)
    assert found is not None
    return found.rules[0].statistics


def test_a_track_is_its_first_part_and_then_the_rest() -> None:
    whole = track(2, 5)
    rest = whole.map(lambda part: part[:, 3:])
    joined = whole.first(3).followed_by(rest)
    assert joined.length == 5
    assert torch.equal(joined.rules[0].states, whole.rules[0].states)
    assert torch.equal(joined.active, whole.active)


def test_rows_follow_every_change_of_the_cache() -> None:
    cache, before = filled(3, 4)
    rows = before.rules[0].statistics
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert torch.equal(recalled(cache, 3), rows[[2, 2, 0]])
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert torch.equal(recalled(cache, 2), rows[[2, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(recalled(cache, 4), rows[[2, 2, 0, 0]])
    cache.crop(-1)
    assert torch.equal(recalled(cache, 4), rows[[2, 2, 0, 0], :3])


def test_a_copy_goes_its_own_way() -> None:
    cache, before = filled(2, 4)
    other = copy.deepcopy(cache)
    other.crop(-3)
    assert isinstance(other, DynamicCache)
    assert recalled(other, 2).shape == (2, 1)
    assert torch.equal(recalled(cache, 2), before.rules[0].statistics)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="its reset keeps the length: then it is refused")
def test_a_cache_that_starts_over_is_forgotten() -> None:
    cache, _ = filled(2, 4)
    cache.reset()
    assert recall(cache, "key", 2) is None


def test_a_cache_without_tokens_has_no_track() -> None:
    assert recall(None, "key", 2) is None
    assert recall(DynamicCache(), "key", 2) is None


def test_a_cache_cut_behind_the_guards_back_is_refused() -> None:
    cache, _ = filled(2, 4)
    cache.layers[0].keys = cache.layers[0].keys[:, :, :3]
    with pytest.raises(AttachError, match=r"holds 3 tokens .* seen 4"):
        recall(cache, "key", 2)


def test_unseen_tokens_and_other_rows_are_refused() -> None:
    cache, _ = filled(2, 4)
    with pytest.raises(AttachError, match="has not seen"):
        recall(cache, "another", 2)
    with pytest.raises(AttachError, match="rows of the cache") as caught:
        recall(cache, "key", 3)
    assert (caught.value.found, caught.value.expected) == (3, 2)
    cache.update(torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2), 0)
    with pytest.raises(AttachError, match="5 tokens"):
        recall(cache, "key", 2)
