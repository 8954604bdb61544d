"""A guardrail on a model: what it changes, what it leaves alone, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import make_guardrail, make_model, make_sae, make_tokenizer
from saeguard.clamp import Clamp
from saeguard.errors import ArtifactMismatchError, AttachError, GuardrailError, LayerError, NonFiniteError
from saeguard.gate import Cusum, Density, Evidence, Gate, Mean, Probe
from saeguard.guardrail import merge
from saeguard.model import decoder_layers, entrances
from saeguard.sae.autoencoder import SparseAutoencoder
from tiny import BOS, PAD, generate, hooks_on, mixed_guardrail, padded, prompts, slow_guard, slow_logits, with_rule

ROWS = prompts(5, 9, 12, 16, 7, 11)
ALWAYS, NEVER = -1.0, 1e9
EVIDENCE = Evidence(torch.tensor([1.0, 0.7, -0.6, 1.3, 0.4, -0.9]), 0.013)
GATES = {
    "cusum": Gate(EVIDENCE, Cusum(0.3)),
    "density cusum": Gate(Density(), Cusum(0.6)),
    "running mean": Gate(Density()),
    "paper": Gate(Density(), Mean(), "block", "attended"),
}


def logits(model: PreTrainedModel, row: Tensor) -> Tensor:
    with torch.no_grad():
        return model(row).logits


def thresholds(model: PreTrainedModel, tokenizer: Any, sae: SparseAutoencoder, gate: Gate) -> float:
    """A threshold between the statistics of the rows."""
    with make_guardrail(model, tokenizer, sae, 1, gate=gate, threshold=NEVER).attach(model, tokenizer) as guard:
        values = sorted({guard.judge(row)[0].statistic for row in ROWS})
    return max((high - low, (high + low) / 2) for low, high in pairwise(values))[1]


@pytest.mark.parametrize("gate", GATES)
def test_without_a_trigger_nothing_changes(model: PreTrainedModel, tokenizer: Any, gate: str) -> None:
    guardrail = make_guardrail(model, tokenizer, make_sae("jumprelu"), 1, gate=GATES[gate], threshold=NEVER)
    batch = padded(ROWS, "left")
    expected, text, sampled = logits(model, ROWS[3]), generate(model, batch), None
    torch.manual_seed(0)
    sampled = generate(model, batch, do_sample=True, output_logits=True, return_dict_in_generate=True)
    with guardrail.attach(model, tokenizer) as guard:
        assert torch.equal(logits(model, ROWS[3]), expected)
        assert torch.equal(generate(model, batch), text)
        torch.manual_seed(0)
        again = generate(model, batch, do_sample=True, output_logits=True, return_dict_in_generate=True)
        assert not any(verdict.triggered for verdict in guard.verdicts)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again.logits, sampled.logits, strict=True))


@pytest.mark.parametrize("kind", ["dense", "active"])
@pytest.mark.parametrize("gate", GATES)
def test_the_slim_form_is_the_full_one(
    model: PreTrainedModel, tokenizer: Any, sae: SparseAutoencoder, gate: str, kind: Any
) -> None:
    guardrail = make_guardrail(
        model, tokenizer, sae, 1, gate=GATES[gate], clamp=Clamp(kind, c=5.0, strength=1.0),
        threshold=thresholds(model, tokenizer, sae, GATES[gate]),
    )  # fmt: skip
    changed = 0
    for row in ROWS:
        unguarded = logits(model, row)
        with slow_guard(model, tokenizer, guardrail, sae):
            expected = (logits if GATES[gate].moment == "block" else slow_logits)(model, row)
        with guardrail.attach(model, tokenizer) as guard:
            guarded, triggered = logits(model, row), guard.verdicts[0].triggered
        torch.testing.assert_close(guarded, expected, rtol=1e-3, atol=1e-3)
        changed += not torch.equal(guarded, unguarded)
        assert triggered or torch.equal(guarded, unguarded)
    assert 0 < changed < len(ROWS)


def test_only_the_rows_and_tokens_that_are_clamped_change(model: PreTrainedModel, tokenizer: Any) -> None:
    guardrail = mixed_guardrail(model, tokenizer, make_sae("jumprelu"), prompts(5, 9, 12, 7, 16, 6, 11, 8))
    batch = padded(prompts(12, 12, 12, 12, 12, 12, seed=3), "left")
    unguarded = logits(model, batch["input_ids"])
    with guardrail.attach(model, tokenizer) as guard:
        guarded = logits(model, batch["input_ids"])
        verdicts = guard.verdicts
    for verdict, mine, theirs in zip(verdicts, guarded, unguarded, strict=True):
        assert torch.equal(mine[: verdict.first_token], theirs[: verdict.first_token])


def test_padding_special_and_first_tokens_never_count(model: PreTrainedModel, tokenizer: Any) -> None:
    sae = make_sae("relu")
    sae = replace(sae, b_enc=sae.b_enc + 1000)
    body = torch.tensor([[BOS, 7, 8, 3, 9, 2]])
    for counts, hot in ("valid", 3), ("attended", 5):
        gate = Gate(Density(), Cusum(0.0), counts=counts)
        with make_guardrail(model, tokenizer, sae, 1, gate=gate, threshold=NEVER).attach(model, tokenizer) as guard:
            for side in "left", "right":
                model(**padded([body, prompts(9)[0]], side))
                assert [verdict.statistic for verdict in guard.verdicts] == [hot, 8]
            model(body[:, 1:])
            assert guard.verdicts[0].statistic == hot - 1


def test_a_block_gate_triggers_at_the_first_token_of_the_block(model: PreTrainedModel, tokenizer: Any) -> None:
    guardrail = make_guardrail(model, tokenizer, make_sae("relu"), 1, gate=GATES["paper"], threshold=ALWAYS)
    with guardrail.attach(model, tokenizer) as guard:
        model(**padded(ROWS, "left"))
        assert {(v.triggered, v.first_token) for v in guard.verdicts} == {(True, 0)}


def test_without_latch_a_sequence_that_was_clamped_says_so(llama: PreTrainedModel, tokenizer: Any) -> None:
    gate, sae = Gate(EVIDENCE, Cusum(0.3), latch=False), make_sae("jumprelu")
    bound = thresholds(llama, tokenizer, sae, gate)
    with make_guardrail(llama, tokenizer, sae, 1, gate=gate, threshold=bound).attach(llama, tokenizer) as guard:
        llama(**padded(ROWS, "left"))
        verdicts = guard.verdicts
    assert all(v.triggered == (v.first_token is not None) == (v.statistic > v.threshold) for v in verdicts)
    assert any(v.triggered for v in verdicts)


class _BoomError(Exception):
    pass


@contextmanager
def broken(module: torch.nn.Module) -> Iterator[None]:
    """A module that raises."""

    def boom(*_: Any) -> None:
        raise _BoomError

    handle = module.register_forward_hook(boom)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("way", ["normal", "in the block", "before the layer", "after the layer", "interrupt"])
def test_after_any_exit_the_model_is_as_it_was(model: PreTrainedModel, tokenizer: Any, way: str) -> None:
    guardrail = make_guardrail(model, tokenizer, make_sae("relu"), 1, threshold=ALWAYS)
    expected, hooks = logits(model, ROWS[0]), hooks_on(model)
    where = {"before the layer": 0, "after the layer": 2}
    try:
        with guardrail.attach(model, tokenizer):
            assert not torch.equal(logits(model, ROWS[0]), expected)
            if way in where:
                with broken(decoder_layers(model)[where[way]]):
                    model(ROWS[0])
            if way != "normal":
                raise KeyboardInterrupt if way == "interrupt" else _BoomError
    except (_BoomError, KeyboardInterrupt):
        assert way != "normal"
    assert hooks_on(model) == hooks
    assert torch.equal(logits(model, ROWS[0]), expected)


def test_the_guarded_layer_by_itself_is_refused_also_after_a_pass_that_failed(
    model: PreTrainedModel, tokenizer: Any
) -> None:
    layers, hidden = decoder_layers(model), torch.randn(1, 5, 32)
    with make_guardrail(model, tokenizer, make_sae("relu"), 1).attach(model, tokenizer):
        with pytest.raises(AttachError, match="outside the model"):
            layers[1](hidden)
        with broken(layers[0]), pytest.raises(_BoomError):
            model(ROWS[0])
        with pytest.raises(AttachError, match="outside the model"):
            layers[1](hidden)


def test_the_decoder_by_itself_is_guarded_too(model: PreTrainedModel, tokenizer: Any) -> None:
    guardrail = make_guardrail(model, tokenizer, make_sae("relu"), 1, threshold=ALWAYS)
    with guardrail.attach(model, tokenizer) as guard, torch.no_grad():
        expected = model(ROWS[0], output_hidden_states=True).hidden_states[-1]
        verdicts = guard.verdicts
        assert torch.equal(entrances(model)[-1](ROWS[0]).last_hidden_state, expected)
        assert guard.verdicts == verdicts


def test_embeddings_instead_of_tokens_are_refused(model: PreTrainedModel, tokenizer: Any) -> None:
    embedded = model.get_input_embeddings()(ROWS[0])
    with make_guardrail(model, tokenizer, make_sae("relu"), 1).attach(model, tokenizer):
        with pytest.raises(AttachError, match="input_ids"):
            model(inputs_embeds=embedded)
        with pytest.raises(AttachError, match="input_ids"):
            generate(model, {"inputs_embeds": embedded})


def test_a_model_that_skips_the_layer_is_refused(tokenizer: Any) -> None:
    llama = make_model("llama")
    with make_guardrail(llama, tokenizer, make_sae("relu"), 3).attach(llama, tokenizer):
        llama.config.num_hidden_layers = 2
        with pytest.raises(AttachError, match="without its layer 3"):
            llama(ROWS[0])


def test_two_guardrails_at_different_layers(model: PreTrainedModel, tokenizer: Any) -> None:
    sae = make_sae("relu")
    low = make_guardrail(model, tokenizer, sae, 0, threshold=ALWAYS)
    high = make_guardrail(model, tokenizer, sae, 2, threshold=ALWAYS, clamp=Clamp("active", 2.0, 1.0))
    for row in ROWS:
        with slow_guard(model, tokenizer, low, sae), slow_guard(model, tokenizer, high, sae):
            expected, text = slow_logits(model, row), generate(model, row, use_cache=False)
        with low.attach(model, tokenizer) as first, high.attach(model, tokenizer) as second:
            torch.testing.assert_close(logits(model, row), expected, rtol=1e-3, atol=1e-3)
            assert torch.equal(generate(model, row), text)
            assert first.verdicts[0].triggered
            assert second.verdicts[0].triggered


def test_a_merged_guardrail_is_both_rules_at_once(model: PreTrainedModel, tokenizer: Any) -> None:
    sae, row = make_sae("jumprelu"), ROWS[3]
    one = make_guardrail(model, tokenizer, sae, 3, features=(1, 2, 3), name="one", threshold=ALWAYS)
    two = make_guardrail(model, tokenizer, sae, 3, features=(4, 5, 6), name="two", threshold=ALWAYS)
    states: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    def changed(guardrail: Any) -> tuple[Tensor, Any]:
        with guardrail.attach(model, tokenizer) as guard:
            handle = decoder_layers(model)[3].register_forward_hook(keep)
            logits(model, row)
            handle.remove()
        return states[-1] - states[0], guard

    changed(with_rule(one, action="monitor"))
    (first, _), (second, _), (both, guard) = changed(one), changed(two), changed(merge([one, two]))
    torch.testing.assert_close(both, first + second, rtol=1e-4, atol=1e-4)
    assert [verdict.rule for verdict in guard.all_verdicts[0]] == ["one", "two"]
    quiet = merge([one, with_rule(two, threshold=NEVER)])
    assert torch.equal(changed(quiet)[0], first)
    assert changed(quiet)[1].verdicts[0].rule == "one"


def test_monitor_reports_and_changes_nothing(model: PreTrainedModel, tokenizer: Any) -> None:
    guardrail = make_guardrail(model, tokenizer, make_sae("relu"), 1, threshold=ALWAYS, action="monitor")
    expected = logits(model, ROWS[0])
    with guardrail.attach(model, tokenizer) as guard:
        assert guard.verdicts == []
        assert torch.equal(logits(model, ROWS[0]), expected)
        assert guard.verdicts[0].triggered
        assert guard.verdicts[0].features


def test_a_guardrail_of_something_else_is_refused_before_a_hook_is_placed(tokenizer: Any) -> None:
    llama, sae = make_model("llama"), make_sae("relu")
    guardrail = make_guardrail(llama, tokenizer, sae, 1)
    cases: list[tuple[type[GuardrailError], Any, Any, Any]] = [
        (ArtifactMismatchError, guardrail, make_model("llama", seed=1), tokenizer),
        (ArtifactMismatchError, guardrail, make_model("gpt2"), tokenizer),
        (ArtifactMismatchError, guardrail, llama, make_tokenizer(chat=False)),
        (LayerError, replace(guardrail, layer=9), llama, tokenizer),
        (ArtifactMismatchError, make_guardrail(llama, tokenizer, make_sae("relu", d_model=16), 1), llama, tokenizer),
    ]
    for error, wrong, model, words in cases:
        hooks = hooks_on(model)
        with pytest.raises(error), wrong.attach(model, words):
            raise AssertionError("attached")
        assert hooks_on(model) == hooks


@pytest.mark.parametrize("gate", [*GATES.values(), Gate(Probe(torch.ones(32), 0.0))], ids=[*GATES, "probe"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(tokenizer: Any, gate: Gate, value: float) -> None:
    llama = make_model("llama")
    with make_guardrail(llama, tokenizer, make_sae("jumprelu"), 1, gate=gate).attach(llama, tokenizer):
        with torch.no_grad():
            llama.get_input_embeddings().weight[17] = value
        llama(torch.tensor([[BOS, 9, 10]]))
        llama(torch.tensor([[BOS, 9, 10, PAD]]), attention_mask=torch.tensor([[1, 1, 1, 0]]))
        with pytest.raises(NonFiniteError, match="layer 1"):
            llama(torch.tensor([[BOS, 9, 17]]))


def test_what_stands_at_padding_never_matters(llama: PreTrainedModel, tokenizer: Any) -> None:
    gate = Gate(Probe(torch.linspace(-1, 1, 32), 0.0), Cusum(0.1))
    row = torch.tensor([[BOS, 9, 10, 11, PAD]])

    def poison(_module: Any, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[:, -1] = float("nan")
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = decoder_layers(llama)[1].register_forward_hook(poison)
    with make_guardrail(llama, tokenizer, make_sae("relu"), 1, gate=gate).attach(llama, tokenizer) as guard:
        llama(row, attention_mask=torch.tensor([[1, 1, 1, 1, 0]]))
        poisoned = guard.verdicts
        handle.remove()
        assert poisoned[0].statistic == pytest.approx(guard.judge(row[:, :-1])[0].statistic)


def test_gradients_flow_through_the_clamp_and_no_record_keeps_them(llama: PreTrainedModel, tokenizer: Any) -> None:
    gate = Gate(Probe(torch.ones(32), 0.0))
    with make_guardrail(llama, tokenizer, make_sae("relu"), 1, gate=gate, threshold=-1e9).attach(
        llama, tokenizer
    ) as guard:
        llama(ROWS[0]).logits.sum().backward()
        assert not any(rule.statistics.requires_grad for rule in guard.last.rules)
    assert llama.get_input_embeddings().weight.grad is not None
    llama.zero_grad()
