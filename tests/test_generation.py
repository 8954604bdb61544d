"""Generation under a guardrail: the same tokens, statistics and verdicts however they are computed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, pipeline

from conftest import make_model, make_sae
from saeguard.errors import AttachError
from saeguard.guardrail import Guardrail
from saeguard.online.intervention import Verdict
from saeguard.sae.autoencoder import SparseAutoencoder
from tiny import NEW, generate, judged, mixed_guardrail, padded, prompts, same_verdicts, slow_guard

LENGTHS = (5, 9, 12, 7, 16, 6, 11, 8)
OLD = transformers.__version__.startswith("4.")
STATIC = "a static cache of transformers 4.57 counts padding whose embedding is zero as absent: then it is refused"


@dataclass(frozen=True)
class Case:
    """A model, prompts, a guardrail of which some trigger, and what the slow guard makes of each prompt."""

    model: PreTrainedModel
    tokenizer: Any
    sae: SparseAutoencoder
    guardrail: Guardrail
    rows: list[Tensor]
    expected: list[Tensor]
    verdicts: list[Verdict]

    def attach(self) -> Any:
        return self.guardrail.attach(self.model, self.tokenizer)

    def slow(self) -> Any:
        return slow_guard(self.model, self.tokenizer, self.guardrail, self.sae)


@pytest.fixture(scope="module")
def case(model: PreTrainedModel, tokenizer: Any) -> Case:
    sae, rows = make_sae("jumprelu"), prompts(*LENGTHS)
    guardrail = mixed_guardrail(model, tokenizer, sae, rows)
    with slow_guard(model, tokenizer, guardrail, sae):
        expected = [generate(model, row, use_cache=False) for row in rows]
    with guardrail.attach(model, tokenizer) as guard:
        verdicts = judged(guard, [row[:, :-1] for row in expected])
    return Case(model, tokenizer, sae, guardrail, rows, expected, verdicts)


def test_prompts_trigger_in_the_prompt_later_and_never(case: Case) -> None:
    when = [
        "never" if v.first_token is None else "prompt" if v.first_token < row.shape[1] else "later"
        for v, row in zip(case.verdicts, case.rows, strict=True)
    ]
    assert set(when) == {"prompt", "later", "never"}


def test_the_clamp_changes_what_is_generated(case: Case) -> None:
    unguarded = [generate(case.model, row) for row in case.rows]
    changed = [not torch.equal(u, g) for u, g in zip(unguarded, case.expected, strict=True)]
    assert any(changed)
    assert all(v.triggered for v, c in zip(case.verdicts, changed, strict=True) if c)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_cache": False}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 3}, {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"}, {"cache_implementation": "static", "prefill_chunk_size": 3},
    ],
    ids=str,
)  # fmt: skip
def test_one_by_one(case: Case, options: dict[str, Any]) -> None:
    with case.attach() as guard:
        for row, expected, verdict in zip(case.rows, case.expected, case.verdicts, strict=True):
            assert torch.equal(generate(case.model, row, **options), expected)
            same_verdicts(guard.verdicts, [verdict])


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}],
    ids=str,
)
def test_batched_with_left_padding(case: Case, options: dict[str, Any]) -> None:
    if OLD and "prefill_chunk_size" in options:
        pytest.skip("transformers 4.57 itself writes other tokens in chunks behind left padding")
    if OLD and "cache_implementation" in options:
        pytest.skip(STATIC)
    batch = padded(case.rows, "left")
    with case.attach() as guard:
        found = generate(case.model, batch, **options)
        same_verdicts(guard.verdicts, case.verdicts)
    assert torch.equal(found[:, -NEW:], torch.cat([row[:, -NEW:] for row in case.expected]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_single_pass(case: Case, side: str) -> None:
    batch = padded(case.expected, side)
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with case.attach() as guard, torch.no_grad():
        alone = [case.model(row).logits[0] for row in case.expected]
        verdicts = judged(guard, case.expected)
        logits = case.model(**batch, position_ids=positions).logits
        same_verdicts(guard.verdicts, verdicts)
        same_verdicts(guard.judge(**batch), verdicts)
        same_verdicts(guard.judge(batch["input_ids"]), verdicts)
    for row, mask, expected in zip(logits, batch["attention_mask"].bool(), alone, strict=True):
        torch.testing.assert_close(row[mask], expected, rtol=1e-3, atol=1e-3)


def test_cached_passes_give_the_logits_of_one_pass(case: Case) -> None:
    with case.attach() as guard, torch.no_grad():
        for row in case.expected:
            whole = case.model(row).logits
            verdict = guard.verdicts
            cache, parts = DynamicCache(config=case.model.config), []
            for chunk in row.split(4, dim=1):
                parts += [case.model(chunk, past_key_values=cache).logits]
            same_verdicts(guard.verdicts, verdict)
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-3)


def test_a_cache_goes_on_over_chat_turns(case: Case) -> None:
    with case.attach() as guard:
        for row, more in zip(case.rows, prompts(*[6] * len(case.rows), seed=1), strict=True):
            first = generate(case.model, row, return_dict_in_generate=True)
            longer = torch.cat([first.sequences, more[:, 1:]], dim=1)
            second = generate(case.model, longer, past_key_values=first.past_key_values)
            verdict = guard.verdicts
            assert torch.equal(second, generate(case.model, longer))
            same_verdicts(verdict, guard.verdicts)
            same_verdicts(verdict, guard.judge(second[:, :-1]))


def test_a_copied_prefix(case: Case) -> None:
    with case.attach() as guard, torch.no_grad():
        for row, expected, verdict in zip(case.rows, case.expected, case.verdicts, strict=True):
            prefix = DynamicCache(config=case.model.config)
            case.model(row[:, :4], past_key_values=prefix)
            for _ in range(2):
                found = generate(case.model, row, past_key_values=copy.deepcopy(prefix))
                assert torch.equal(found, expected)
                same_verdicts(guard.verdicts, [verdict])


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 3},
     {"num_beams": 3, "do_sample": True, "num_return_sequences": 2}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_and_samples_are_those_of_the_slow_guard(case: Case, options: dict[str, Any], cache: str) -> None:
    if OLD and cache == "static":
        pytest.skip(STATIC)
    batch = padded(case.rows[:4], "left")
    kind = {} if cache == "dynamic" else {"cache_implementation": cache}
    with case.slow():
        torch.manual_seed(0)
        expected = generate(case.model, batch, use_cache=False, **options)
    with case.attach() as guard:
        torch.manual_seed(0)
        assert torch.equal(generate(case.model, batch, **kind, **options), expected)
        mask = batch["attention_mask"].repeat_interleave(options.get("num_return_sequences", 1), dim=0)
        rows = [row[-int(m.sum()) - NEW :][None] for row, m in zip(expected, mask, strict=True)]
        same_verdicts(guard.judge(expected), judged(guard, rows))


def test_samples_keep_their_own_state(case: Case) -> None:
    with case.attach() as guard:
        for row in case.rows:
            torch.manual_seed(1)
            found = generate(case.model, row, do_sample=True, num_return_sequences=3)
            same_verdicts(guard.verdicts, guard.judge(found[:, :-1]))


@pytest.mark.skipif(OLD, reason="transformers 4.57 does not take min_new_tokens with an assistant")
def test_assisted_decoding_gives_the_tokens_of_the_slow_guard(case: Case) -> None:
    assistant = make_model("llama", seed=5)
    with case.attach() as guard:
        for row, expected, verdict in zip(case.rows, case.expected, case.verdicts, strict=True):
            assert torch.equal(generate(case.model, row, assistant_model=assistant), expected)
            same_verdicts(guard.verdicts, [verdict])
            assert torch.equal(generate(case.model, row, assistant_model=case.model), expected)


def test_a_generation_that_stops_early_counts_no_token_it_did_not_keep(case: Case) -> None:
    with case.attach() as guard:
        for row, expected in zip(case.rows, case.expected, strict=True):
            stop = int(expected[0, row.shape[1] + 3])
            found = generate(case.model, row, min_new_tokens=1, eos_token_id=stop)
            same_verdicts(guard.verdicts, guard.judge(found[:, :-1]))


def test_a_cache_that_the_guard_did_not_see_is_refused(case: Case) -> None:
    row = case.rows[0]
    cache = case.model(row, use_cache=True).past_key_values
    with case.attach(), pytest.raises(AttachError, match="has not seen"):
        case.model(row[:, -1:], past_key_values=cache)


def test_a_cache_expanded_by_hand(case: Case) -> None:
    row, token = case.rows[0], case.rows[1][:, 1:2]
    with case.attach() as guard, torch.no_grad():
        cache = case.model(row, use_cache=True).past_key_values
        case.model(token, past_key_values=copy.deepcopy(cache))
        verdict = guard.verdicts[0]
        cache.batch_repeat_interleave(3)
        case.model(token.expand(3, 1), past_key_values=cache)
        same_verdicts(guard.verdicts, [verdict] * 3)
        cache.batch_select_indices(torch.tensor([0, 2]))
        with pytest.raises(AttachError, match="rows of the cache"):
            case.model(token.expand(3, 1), past_key_values=cache)
        cache.reset()
        assert len(guard.verdicts) == 2


def test_turns_go_on_from_the_state_and_a_new_cache_begins_anew(case: Case) -> None:
    row = case.rows[0]
    with case.attach() as guard, torch.no_grad():
        whole = guard.judge(row)
        cache = case.model(row[:, :2], use_cache=True).past_key_values
        for place in range(2, row.shape[1]):
            case.model(row[:, place : place + 1], past_key_values=cache)
        same_verdicts(guard.verdicts, whole)
        case.model(row[:, :2])
        same_verdicts(guard.verdicts, guard.judge(row[:, :2]))


def test_a_pipeline(case: Case) -> None:
    text = pipeline("text-generation", model=case.model, tokenizer=case.tokenizer)
    with case.attach() as guard:
        length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
        found = text("A telescope gathers", do_sample=False, return_tensors=True, **length)
        same_verdicts(guard.verdicts, guard.judge(torch.tensor([found[0]["generated_token_ids"]])[:, :-1]))
