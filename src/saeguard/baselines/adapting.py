"""Which weights are trained, and the model as it was before: by LoRA adapters, or in full beside a frozen copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from saeguard.baselines.likelihood import Reference
from saeguard.errors import BaselineError
from saeguard.model import decoder_layers, linear_modules


def trainable(model: nn.Module, modules: Sequence[str] | None, lora_rank: int) -> nn.Module:
    """The model with only some weights trained: of these modules, or of all; whole, or as adapters of a rank.

    Dropout is turned off: the model before and the model now are to differ by what was learned alone.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if lora_rank:
        return _with_adapters(model, _adapted_modules(model, modules), lora_rank)
    wanted = None if modules is None else {f"{name}.weight" for name in modules}
    for name, weight in model.named_parameters():
        weight.requires_grad_(wanted is None or name in wanted)
    return model


def trained_weights(model: nn.Module, modules: Sequence[str] | None, lora_rank: int) -> int:
    """How many weights `trainable` would train."""
    if lora_rank:
        names = [f"{name}.weight" for name in _adapted_modules(model, modules)]
        return sum(lora_rank * sum(model.get_parameter(name).shape) for name in names)
    weights = dict(model.named_parameters())
    return sum(weight.numel() for name, weight in weights.items() if modules is None or name[:-7] in modules)


def reference_of(model: nn.Module) -> Reference:
    """The model before training: its adapters put aside, or else a copy, made now."""
    if hasattr(model, "disable_adapter"):
        adapted: Any = model

        @contextmanager
        def without_adapters() -> Iterator[nn.Module]:
            with torch.no_grad(), adapted.disable_adapter():
                yield adapted

        return without_adapters
    frozen = copy.deepcopy(model).eval().requires_grad_(False)

    @contextmanager
    def the_copy() -> Iterator[nn.Module]:
        with torch.no_grad():
            yield frozen

    return the_copy


def no_reference() -> NoReturn:
    """For losses that do not ask for the model before."""
    raise NotImplementedError("this loss asks for the model before, which its plan does not say")


def _adapted_modules(model: nn.Module, modules: Sequence[str] | None) -> Sequence[str]:
    return linear_modules(model, range(len(decoder_layers(model)))) if modules is None else modules


def _with_adapters(model: Any, modules: Sequence[str], rank: int) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise BaselineError("training adapters needs peft: pip install 'saeguard[baselines]'") from error
    transposed = not isinstance(model.get_submodule(modules[0]), nn.Linear)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(modules), fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )
    adapted: nn.Module = get_peft_model(model, config)
    return adapted
