"""The only place where hooks are placed on a module, and the only way they come off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

AfterModule = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
BeforeModule = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def hooked(layer: nn.Module, after: AfterModule) -> Iterator[None]:
    """Call `after` on each output of `layer`, until the block is left, normally or by an error.

    What it returns replaces the output; None keeps it. Inside the block `torch.compile` is put aside: compiled
    code would go past hooks placed after it was compiled, and keep those that were taken off.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def around(model: nn.Module, before: BeforeModule, after: AfterModule) -> Iterator[None]:
    """Call `before` on each input of `model` and `after` on each output, which is None where the pass raised."""
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
        yield
