"""The only place where hooks are placed on a module, and the only way they come off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

AfterLayer = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
BeforeModel = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def hooked(
    layer: nn.Module, after: AfterLayer, *, model: nn.Module | None = None, before: BeforeModel | None = None
) -> Iterator[None]:
    """Call `after` on each output of `layer` (what it returns replaces the output, None keeps it)
    and `before` on each input of `model`, until the block is left, normally or by an error.
    """
    with ExitStack() as stack:
        if model is not None and before is not None:
            stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
        yield
