"""A trigger reaches back: what comes after a token is that of the tokens up to it, read alone and clamped whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from conftest import make_guardrail, make_sae
from saeguard.clamp import Clamp
from saeguard.errors import AttachError
from saeguard.gate import Cusum, Evidence, Gate
from saeguard.guardrail import Guardrail
from saeguard.online.intervention import Guard
from tiny import NEW, mixed_guardrail, padded, prompts, same_verdicts, slow_guard, with_rule

ROWS = prompts(5, 9, 12, 16, 7, 11)
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(scope="module")
def back(llama: PreTrainedModel, tokenizer: Any) -> Guardrail:
    """Triggers within some rows."""
    return mixed_guardrail(llama, tokenizer, make_sae("jumprelu"), ROWS)


def first_triggered(guardrail: Guardrail, model: PreTrainedModel, tokenizer: Any) -> Tensor:
    """The row that triggers farthest from its ends."""
    with guardrail.attach(model, tokenizer) as guard:
        found = {row.shape[1] - guard.judge(row)[0].first_token: row for row in ROWS if guard.judge(row)[0].triggered}
    return found[max(found)]


@contextmanager
def guarded(model: PreTrainedModel, tokenizer: Any, *guardrails: Guardrail) -> Iterator[list[Guard]]:
    with ExitStack() as stack:
        yield [stack.enter_context(guardrail.attach(model, tokenizer)) for guardrail in guardrails]


@torch.no_grad()
def test_every_output_is_that_of_the_tokens_up_to_it(llama: PreTrainedModel, tokenizer: Any, back: Guardrail) -> None:
    row = first_triggered(back, llama, tokenizer)
    with slow_guard(llama, tokenizer, back, make_sae("jumprelu")):
        parts = [llama(row[:, :end], output_hidden_states=True) for end in range(1, row.shape[1] + 1)]
    plain = llama(row, output_hidden_states=True)
    with back.attach(llama, tokenizer):
        out = llama(row, output_hidden_states=True, labels=row)
        as_tuple = llama(row, return_dict=False, use_cache=False)
        last = llama(row, logits_to_keep=2).logits
        some = llama(row, logits_to_keep=torch.tensor([1, row.shape[1] - 2])).logits
        decoder = llama.model(row, output_hidden_states=True)
    assert not torch.allclose(out.logits, plain.logits, **CLOSE)
    expected = torch.cat([part.logits[:, -1:] for part in parts], dim=1)
    for found, of in ((out.logits, expected), (as_tuple[0], expected), (last, expected[:, -2:])):
        torch.testing.assert_close(found, of, **CLOSE)
    torch.testing.assert_close(some, expected[:, [1, -2]], **CLOSE)
    for layer, found in enumerate(out.hidden_states):
        if layer == 1 + back.layer:  # whether it is noted in front of the clamp or behind, the order of hooks decides
            continue
        of = torch.cat([part.hidden_states[layer][:, -1:] for part in parts], dim=1)
        torch.testing.assert_close(found, of, **CLOSE)
        torch.testing.assert_close(decoder.hidden_states[layer], of, **CLOSE)
    torch.testing.assert_close(decoder.last_hidden_state, out.hidden_states[-1])
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], row[0, 1:])
    torch.testing.assert_close(out.loss, loss, **CLOSE)


@torch.no_grad()
def test_onward_clamps_from_the_trigger_and_reads_nothing_twice(
    llama: PreTrainedModel, tokenizer: Any, back: Guardrail
) -> None:
    row, passes = first_triggered(back, llama, tokenizer), []
    counting = llama.model.layers[-1].register_forward_pre_hook(lambda *_: passes.append(1))
    onward = with_rule(back, reach="onward")
    with slow_guard(llama, tokenizer, onward, make_sae("jumprelu")):
        expected = llama(row).logits
    for guardrail, count in ((onward, 1), (back, 2)):
        passes.clear()
        with guardrail.attach(llama, tokenizer):
            found = llama(row).logits
        assert len(passes) == count
        assert torch.allclose(found, expected, **CLOSE) == (guardrail is onward)
    counting.remove()


@torch.no_grad()
@pytest.mark.parametrize("upper_first", [False, True])
def test_a_guard_behind_reads_what_the_one_in_front_makes_of_a_sequence(
    llama: PreTrainedModel, tokenizer: Any, back: Guardrail, upper_first: bool
) -> None:
    gate = Gate(Evidence(torch.tensor([0.9, -0.4, 1.1]), 0.0), Cusum(0.2))
    upper = make_guardrail(llama, tokenizer, make_sae("topk"), 3, features=(3, 7, 23), gate=gate, threshold=1.5)
    pair = (upper, back) if upper_first else (back, upper)
    batch = padded(ROWS, "left")
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    seen = set()
    with guarded(llama, tokenizer, *pair) as guards:
        for row in ROWS:
            whole = llama(row, logits_to_keep=1).logits
            verdicts = [guard.verdicts for guard in guards]
            for size in (1, 3):
                cache = DynamicCache(config=llama.config)
                for chunk in row.split(size, dim=1):
                    parts = llama(chunk, past_key_values=cache).logits
                torch.testing.assert_close(parts[:, -1:], whole, **CLOSE)
                for guard, verdict in zip(guards, verdicts, strict=True):
                    same_verdicts(guard.verdicts, verdict)
            for guard, verdict in zip(guards, verdicts, strict=True):
                same_verdicts(guard.judge(row), verdict)
            seen.add(tuple(verdict[0].triggered for verdict in verdicts))
        alone = [llama(row).logits[:, -1] for row in ROWS]
        together = llama(**batch, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)
    assert len(seen) > 2, "rows on which both, one and none trigger"


@torch.no_grad()
def test_guards_on_two_layers_write_the_same_with_and_without_a_cache(
    llama: PreTrainedModel, tokenizer: Any, back: Guardrail
) -> None:
    gate = Gate(Evidence(torch.tensor([0.9, -0.4, 1.1]), 0.0), Cusum(0.2))
    clamp = Clamp("dense", c=40.0, strength=8.0)
    upper = make_guardrail(
        llama, tokenizer, make_sae("topk"), 3, features=(3, 7, 23), gate=gate, threshold=1.5, clamp=clamp
    )
    seen, alone = set(), {}
    for row in ROWS:
        its = {"attention_mask": torch.ones_like(row), "max_new_tokens": NEW, "min_new_tokens": NEW}
        with guarded(llama, tokenizer, back, upper) as guards:
            text = llama.generate(row, **its)
            found = tuple(guard.verdicts[0].triggered for guard in guards)
            assert torch.equal(llama.generate(row, use_cache=False, **its), text)
            assert tuple(guard.verdicts[0].triggered for guard in guards) == found
        for guardrail in (back, upper):
            with guardrail.attach(llama, tokenizer):
                alone[guardrail is back] = llama.generate(row, **its)
        seen.add((*found, torch.equal(text, alone[True]), torch.equal(text, alone[False])))
    assert len({one[:2] for one in seen}) > 2, "rows on which both, one and none trigger"
    assert (True, True, False, False) in seen, "where both trigger, the text is that of neither alone"


@torch.no_grad()
def test_what_normalisation_found_outlasts_a_second_reading(
    llama: PreTrainedModel, tokenizer: Any, back: Guardrail, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = first_triggered(back, llama, tokenizer)
    upper = make_guardrail(llama, tokenizer, make_sae("topk"), 3, threshold=1e9)
    with back.attach(llama, tokenizer), upper.attach(llama, tokenizer, normalise=True) as guard:
        monkeypatch.setattr(guard, "_by_normalised", lambda ids, _attended: torch.ones(len(ids), 1, dtype=torch.bool))
        for kv in (None, DynamicCache(config=llama.config)):
            llama(row, past_key_values=kv, use_cache=kv is not None)
            assert guard.last.rules[0].triggered.all()
            assert guard.last.rules[0].clamped.all()


@torch.no_grad()
def test_a_trigger_that_is_taken_back_leaves_the_cache_as_if_it_had_not_been(
    llama: PreTrainedModel, tokenizer: Any, back: Guardrail
) -> None:
    row = first_triggered(back, llama, tokenizer)
    with back.attach(llama, tokenizer) as guard:
        first = guard.judge(row)[0].first_token
        cache = DynamicCache(config=llama.config)
        llama(row, past_key_values=cache)
        cache.crop(first - row.shape[1])
        other = torch.full((1, 1), 7)
        found = llama(other, past_key_values=cache).logits
        assert not guard.verdicts[0].triggered
    torch.testing.assert_close(found, llama(torch.cat([row[:, :first], other], dim=1)).logits[:, -1:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_what_may_clamp_can_change_between_passes(
    llama: PreTrainedModel, tokenizer: Any, back: Guardrail, in_place: bool
) -> None:
    row, following = first_triggered(back, llama, tokenizer), torch.tensor([[7, 8, 9]])
    plain = llama(torch.cat([row, following], dim=1)).logits[:, -3:]
    with back.attach(llama, tokenizer) as guard:
        guarded = llama(torch.cat([row, following], dim=1)).logits[:, -3:]
        cache = DynamicCache(config=llama.config)
        guard.clamping = torch.ones(1, 1, dtype=torch.bool)
        llama(row, past_key_values=cache)
        found = []
        for clamps, token in zip((True, False, True), following[0], strict=True):
            guard.clamping = guard.clamping.fill_(clamps) if in_place else torch.full((1, 1), clamps)
            found.append(llama(token.view(1, 1), past_key_values=cache).logits)
    expected = torch.stack([guarded[:, 0], plain[:, 1], guarded[:, 2]], dim=1)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, **CLOSE)
    assert not torch.allclose(guarded, plain, **CLOSE)


class OtherLayer(DynamicLayer):
    """Keeps keys and values in a way of its own, for all that anyone knows."""


def test_a_cache_whose_rows_cannot_be_replaced_is_refused(
    llama: PreTrainedModel, tokenizer: Any, back: Guardrail
) -> None:
    def other() -> DynamicCache:
        cache = DynamicCache(config=llama.config)
        cache.layers = [OtherLayer() for _ in llama.model.layers]
        return cache

    with back.attach(llama, tokenizer), pytest.raises(AttachError, match="--reach onward"):
        llama(ROWS[0], past_key_values=other())
    with with_rule(back, reach="onward").attach(llama, tokenizer):
        llama(ROWS[0], past_key_values=other())


def test_only_a_gate_that_stays_triggered_and_clamps_reaches_back(back: Guardrail) -> None:
    rule = back.rule
    assert rule.reaches_back
    assert not replace(rule, reach="onward").reaches_back
    assert not replace(rule, action="monitor").reaches_back
    assert not replace(rule, gate=replace(rule.gate, latch=False)).reaches_back
