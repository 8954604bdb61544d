"""Guards one inside another: what comes out depends on the tokens and the guards, not on who was attached first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from conftest import make_guardrail, make_sae
from saeguard.attacks.spelling import zero_width
from saeguard.clamp import Clamp
from saeguard.gate import Cusum, Evidence, Gate
from saeguard.guardrail import Guardrail
from saeguard.online.intervention import Guard
from tiny import mixed_guardrail, padded, prompts, same_verdicts, slow_guard, slow_logits, with_rule

ROWS = [*prompts(5, 9, 12, 16, 7, 11, 20, 24), *prompts(20, 21, 22, 23, 24, 25, seed=1)]
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
ORDERS = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["front first", "behind first"])


@pytest.fixture(scope="module")
def pair(llama: PreTrainedModel, tokenizer: Any) -> tuple[Guardrail, Guardrail]:
    """One in front and one behind; each triggers on some rows, now one first and now the other."""
    clamp = Clamp("dense", c=12.0, strength=8.0)
    front = mixed_guardrail(llama, tokenizer, make_sae("jumprelu"), ROWS[:6], clamp=clamp)
    gate = Gate(Evidence(torch.tensor([0.9, -0.4, 1.1, 0.5, 0.8]), 0.0), Cusum(0.2))
    behind = make_guardrail(
        llama, tokenizer, make_sae("topk"), 2, features=(3, 7, 23, 12, 40), gate=gate, threshold=0.5,
        clamp=Clamp("dense", c=40.0, strength=8.0),
    )  # fmt: skip
    return front, behind


@contextmanager
def guarded(model: PreTrainedModel, tokenizer: Any, guardrails: Sequence[Guardrail]) -> Iterator[list[Guard]]:
    with ExitStack() as stack:
        yield [stack.enter_context(guardrail.attach(model, tokenizer)) for guardrail in guardrails]


@pytest.fixture(scope="module")
def expected(llama: PreTrainedModel, tokenizer: Any, pair: tuple[Guardrail, Guardrail]) -> list[Tensor]:
    """What comes after each token of each row, from the tokens up to it alone, in the longest form."""
    front, behind = pair
    slow_front = slow_guard(llama, tokenizer, front, make_sae("jumprelu"))
    with slow_front, slow_guard(llama, tokenizer, behind, make_sae("topk")):
        return [slow_logits(llama, row) for row in ROWS]


@torch.no_grad()
def test_one_triggers_before_the_other_and_after_it_and_alone(
    llama: PreTrainedModel, tokenizer: Any, pair: tuple[Guardrail, Guardrail]
) -> None:
    found = []
    for row in ROWS:
        with guarded(llama, tokenizer, pair) as guards:
            found.append([guard.judge(row)[0].first_token for guard in guards])
        with pair[1].attach(llama, tokenizer) as guard:
            found[-1].append(guard.judge(row)[0].first_token)
    assert any(None not in (front, behind) and front < behind for front, behind, _ in found)
    assert any(front is not None and behind is None for front, behind, _ in found)
    assert any(front is None and behind is not None for front, behind, _ in found)
    assert any(None not in (front, alone) and alone < front for front, _, alone in found)


@torch.no_grad()
@ORDERS
@pytest.mark.parametrize("size", [None, 30, 4, 1])
def test_every_output_is_that_of_the_tokens_up_to_it(
    llama: PreTrainedModel, tokenizer: Any, pair: tuple[Guardrail, Guardrail], expected: list[Tensor],
    order: tuple[int, int], size: int | None,
) -> None:  # fmt: skip
    with guarded(llama, tokenizer, [pair[i] for i in order]) as guards:
        for row, of in zip(ROWS, expected, strict=True):
            cache = None if size is None else DynamicCache(config=llama.config)
            parts = [llama(part, past_key_values=cache, use_cache=bool(size)) for part in row.split(size or 99, dim=1)]
            torch.testing.assert_close(torch.cat([part.logits for part in parts], dim=1), of, **CLOSE)
            verdicts = [guard.verdicts for guard in guards]
            for guard, verdict in zip(guards, verdicts, strict=True):
                same_verdicts(verdict, guard.judge(row))


@torch.no_grad()
@ORDERS
@pytest.mark.parametrize("cached", [False, True])
def test_in_a_batch_too(
    llama: PreTrainedModel, tokenizer: Any, pair: tuple[Guardrail, Guardrail], expected: list[Tensor],
    order: tuple[int, int], cached: bool,
) -> None:  # fmt: skip
    batch = padded(ROWS, "left")
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with guarded(llama, tokenizer, [pair[i] for i in order]):
        found = llama(**batch, position_ids=positions, use_cache=cached).logits
        parts, cache = [], DynamicCache(config=llama.config)
        for end in range(5, 30, 5):
            ids, place = batch["input_ids"][:, end - 5 : end], positions[:, end - 5 : end]
            mask = batch["attention_mask"][:, :end]
            parts.append(llama(ids, attention_mask=mask, position_ids=place, past_key_values=cache).logits)
    for logits in (found, torch.cat(parts, dim=1)):
        for its, of in zip(logits, expected, strict=True):
            torch.testing.assert_close(its[-of.shape[1] :], of[0], **CLOSE)


@torch.no_grad()
@ORDERS
def test_triggers_that_are_taken_back_leave_the_cache_as_if_they_had_not_been(
    llama: PreTrainedModel, tokenizer: Any, pair: tuple[Guardrail, Guardrail], order: tuple[int, int]
) -> None:
    with guarded(llama, tokenizer, [pair[i] for i in order]) as guards:
        for row in ROWS:
            cache = DynamicCache(config=llama.config)
            llama(row, past_key_values=cache)
            for kept in (row.shape[1] - 2, 3):
                cache.crop(kept - cache.get_seq_length())
                other = torch.full((1, 1), 7)
                found = llama(other, past_key_values=cache).logits
                verdicts = [guard.verdicts for guard in guards]
                row = torch.cat([row[:, :kept], other], dim=1)
                torch.testing.assert_close(found, llama(row, use_cache=False).logits[:, -1:], **CLOSE)
                for guard, verdict in zip(guards, verdicts, strict=True):
                    same_verdicts(guard.verdicts, verdict)


@torch.no_grad()
def test_rules_of_one_guardrail_reach_from_where_each_has_triggered(
    llama: PreTrainedModel, tokenizer: Any, pair: tuple[Guardrail, Guardrail]
) -> None:
    front, _ = pair
    gate = Gate(Evidence(torch.tensor([0.9, -0.4, 1.1, 0.5, 0.8]), 0.0), Cusum(0.2))
    other = make_guardrail(
        llama, tokenizer, make_sae("jumprelu"), 1, features=(3, 7, 23, 12, 40), gate=gate, threshold=0.5,
        clamp=Clamp("dense", c=40.0, strength=8.0),
    )  # fmt: skip
    both = replace(front, rules=(front.rule, replace(other.rule, name="other")))
    later = 0
    with both.attach(llama, tokenizer) as guard:
        for row in ROWS:
            expected = torch.cat(
                [llama(row[:, :end], logits_to_keep=1).logits for end in range(1, row.shape[1] + 1)], dim=1
            )
            for cache in (None, DynamicCache(config=llama.config)):
                found = llama(row, past_key_values=cache, use_cache=cache is not None).logits
                torch.testing.assert_close(found, expected, **CLOSE)
            first = {verdict.first_token for verdict in guard.all_verdicts[0]}
            later += None not in first and len(first) == 2
    assert later, "rows on which both trigger, one after the other"


@torch.no_grad()
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)], ids=str)
def test_of_three_the_same_is_true(
    llama: PreTrainedModel, tokenizer: Any, pair: tuple[Guardrail, Guardrail], order: tuple[int, ...]
) -> None:
    gate = Gate(Evidence(torch.tensor([0.8, 0.5, -0.3]), 0.0), Cusum(0.1))
    clamp = Clamp("dense", c=6.0, strength=8.0)
    ahead = make_guardrail(
        llama, tokenizer, make_sae("relu"), 0, features=(5, 9, 30), gate=gate, threshold=0.5, clamp=clamp
    )
    seen = set()
    for row in ROWS[::2]:
        with ExitStack() as stack:
            for guardrail, kind in zip((ahead, *pair), ("relu", "jumprelu", "topk"), strict=True):
                stack.enter_context(slow_guard(llama, tokenizer, guardrail, make_sae(kind)))
            expected = slow_logits(llama, row)
        with guarded(llama, tokenizer, [(ahead, *pair)[i] for i in order]) as guards:
            cache = DynamicCache(config=llama.config)
            parts = [llama(part, past_key_values=cache).logits for part in row.split(8, dim=1)]
            seen.add(tuple(guards[order.index(i)].verdicts[0].first_token for i in range(3)))
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, **CLOSE)
            torch.testing.assert_close(llama(row, use_cache=False).logits, expected, **CLOSE)
    assert any(None not in each for each in seen)


@torch.no_grad()
def test_each_reads_the_normalised_form_of_a_prompt(
    llama: PreTrainedModel, tokenizer: Any, pair: tuple[Guardrail, Guardrail]
) -> None:
    pytest.importorskip("confusable_homoglyphs")
    eager = [with_rule(guardrail, threshold=0.0) for guardrail in pair]
    odd = torch.tensor([tokenizer(zero_width("the planet and the star and the moon of a planet"))["input_ids"]])
    with guarded(llama, tokenizer, eager) as guards:
        assert all(guard.judge(odd)[0].first_token != 0 for guard in guards)
    found = []
    for order in (eager, eager[::-1]):
        with ExitStack() as stack:
            guards = [stack.enter_context(each.attach(llama, tokenizer, normalise=True)) for each in order]
            found.append(llama(odd).logits)
            assert [guard.verdicts[0].first_token for guard in guards] == [0, 0]
    torch.testing.assert_close(*found)
