"""Hooks stay as long as their block, whatever happens in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from saeguard.hooks import around, hooked


def test_a_layer_hook_replaces_the_output_inside_the_block_only() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = layer(x)
    with hooked(layer, lambda _m, _a, _k, output: output + 1):
        assert torch.equal(layer(x), expected + 1)
    assert torch.equal(layer(x), expected)


def test_hooks_come_off_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt), around(layer, lambda *_: None, lambda *_: None), hooked(layer, lambda *_: None):
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
    with hooked(layer, lambda _m, _a, _k, output: output + 1):
        torch.testing.assert_close(compiled(x), expected + 1)
    torch.testing.assert_close(compiled(x), expected)
