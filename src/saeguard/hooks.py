"""The only place where hooks are placed on a module, and the only way they come off again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saeguard.errors import ModelError

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
Change = Callable[[Tensor], Tensor | None]
"""Sees a tensor; what it returns takes the tensor's place, None keeps it."""


@dataclass(frozen=True)
class Port:
    """Where a tensor can be seen and replaced: what goes into a module, or what comes out of it.

    Of several inputs or outputs it is the first, as decoder blocks and their parts have it.
    """

    module: nn.Module
    side: Literal["input", "output"]


@contextmanager
def at(port: Port, change: Change) -> Iterator[None]:
    """Call `change` on each tensor that passes the port, until the block is left, normally or by an error.

    Inside the block `torch.compile` is put aside: compiled code would go past hooks placed after it was compiled, and
    keep those that were taken off.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if port.side == "output":
            handle = port.module.register_forward_hook(lambda _module, _args, output: _of_output(output, change))
        else:
            handle = port.module.register_forward_pre_hook(
                lambda _module, args, kwargs: _of_input(args, kwargs, change), with_kwargs=True
            )
        stack.callback(handle.remove)
        yield


@contextmanager
def around(module: nn.Module, before: Before, after: After | None = None) -> Iterator[None]:
    """Call `before` on each input of `module` and `after` on each output, which is None where the pass raised; what
    `after` returns takes the output's place, None keeps it."""
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        if after is not None:
            stack.callback(module.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
        yield


def inputs_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a call of a module is given, by the names that its `forward` has for it."""
    return {**dict(zip(_positional(type(module).forward), args, strict=False)), **kwargs}


@cache
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what may be given by its place, `self` left out."""
    its = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(one.name for one in its if one.kind is one.POSITIONAL_OR_KEYWORD)


def _of_output(output: Any, change: Change) -> Any:
    new = change(_tensor(output[0] if isinstance(output, tuple) else output))
    if new is None:
        return None
    return (new, *output[1:]) if isinstance(output, tuple) else new


def _of_input(args: tuple[Any, ...], kwargs: dict[str, Any], change: Change) -> Any:
    if args:
        new = change(_tensor(args[0]))
        return None if new is None else ((new, *args[1:]), kwargs)
    name = next((name for name, value in kwargs.items() if isinstance(value, Tensor)), None)
    new = change(_tensor(None if name is None else kwargs[name]))
    return None if new is None else (args, kwargs | {name: new})


def _tensor(found: Any) -> Tensor:
    if not isinstance(found, Tensor):
        raise ModelError(f"a part of a decoder block passed on {type(found).__name__}, expected a tensor")
    return found
