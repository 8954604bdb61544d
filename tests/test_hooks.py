"""Hooks stay as long as their block, whatever happens in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel

from conftest import make_guardrail, make_sae
from saeguard.hooks import Port, around, at
from tiny import generate, prompts


def test_a_port_replaces_the_output_inside_the_block_only() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = layer(x)
    with at(Port(layer, "output"), lambda values: values + 1):
        assert torch.equal(layer(x), expected + 1)
    assert torch.equal(layer(x), expected)


def test_hooks_come_off_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    with (
        pytest.raises(KeyboardInterrupt),
        around(layer, lambda *_: None, lambda *_: None),
        at(Port(layer, "input"), lambda values: None),
        at(Port(layer, "output"), lambda values: None),
    ):
        raise KeyboardInterrupt
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_after_a_pass_that_raised_the_output_is_none() -> None:
    layer, outputs = nn.Linear(2, 2), []

    def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        outputs.append(output)

    with around(layer, lambda *_: None, after):
        with pytest.raises(RuntimeError, match="shapes"):
            layer(torch.ones(1, 3))
        layer(torch.ones(1, 2))
    assert outputs[0] is None
    assert outputs[1] is not None


def test_compiled_code_meets_hooks_placed_later_and_none_taken_off() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    compiled = torch.compile(layer, backend="eager")
    expected = compiled(x)
    with at(Port(layer, "output"), lambda values: values + 1):
        torch.testing.assert_close(compiled(x), expected + 1)
    torch.testing.assert_close(compiled(x), expected)


@torch.no_grad()
def test_a_model_compiled_before_is_guarded_and_free_afterwards(llama: PreTrainedModel, tokenizer: Any) -> None:
    compiled = torch.compile(llama, backend="eager")
    options = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode=None)}
    options["compile_config"]._compile_all_devices = True
    row = prompts(9)[0]
    unguarded, text = compiled(row).logits, generate(llama, row, **options)
    guardrail = make_guardrail(llama, tokenizer, make_sae("relu"), 1, threshold=-1.0)
    with guardrail.attach(llama, tokenizer) as guard:
        guarded = llama(row).logits
        torch.testing.assert_close(compiled(row).logits, guarded)
        assert torch.equal(generate(llama, row, **options), generate(llama, row))
        assert guard.verdicts[0].triggered
    assert not torch.allclose(guarded, unguarded)
    assert torch.equal(compiled(row).logits, unguarded)
    assert torch.equal(generate(llama, row, **options), text)
