"""Guards on one model, one inside another: what comes out does not depend on which of them was attached first.

A guard that reads deeper sees what those in front of it have made of a sequence. So before a pass the one in front is
served first, and after it last: then the deeper ones have read again as the front one had it so far, what that reads
again counts from its trigger on, and in it the deeper ones do the same once more. Of two guards at one and the same
place, the one attached first is in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from saeguard.hooks import inputs_of
from saeguard.online.rereading import Reading


class Guarding(Protocol):
    """What a guard does at the ends of a pass."""

    @property
    def depth(self) -> tuple[int, int]: ...

    @property
    def in_a_pass(self) -> bool: ...

    def settle(self, reading: Reading) -> Tensor | None: ...

    def begin(self, reading: Reading, presumed: Tensor | None) -> None: ...

    def end(self, module: nn.Module, output: Any) -> Any: ...


_GUARDS: WeakKeyDictionary[nn.Module, list[Guarding]] = WeakKeyDictionary()


@contextmanager
def together(guard: Guarding, layers: nn.Module) -> Iterator[Sequence[Guarding]]:
    """All guards on the model of these layers, from front to back, this one among them in the block."""
    guards = _GUARDS.setdefault(layers, [])
    guards.append(guard)
    guards.sort(key=lambda one: one.depth)
    try:
        yield guards
    finally:
        guards.remove(guard)


def before_model(guards: Sequence[Guarding], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook before the model and each part of it that holds the layers: the outermost part that is given `input_ids`
    begins the pass; the parts inside it find it begun."""
    waiting = [guard for guard in guards if not guard.in_a_pass]
    if not waiting:
        return
    reading = Reading(module, inputs_of(module, args, kwargs))
    if not isinstance(reading.inputs.get("input_ids"), Tensor):
        return
    presumed = [guard.settle(reading) for guard in waiting]
    for guard, its in zip(waiting, presumed, strict=True):
        guard.begin(reading, its)


def after_model(
    guards: Sequence[Guarding], module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
) -> Any:
    """Hook after each of them, also where it raised: the output as all guards leave it."""
    for guard in reversed(guards):
        output = guard.end(module, output)
    return output
