"""The weights, white box: running them without the hook, and rounding them to 8 and 4 bits.

Rounding: every matrix of the decoder blocks, to the nearest of 2^bits - 1 even steps between minus and plus the largest
of each group of `GROUP` weights along a row; computed by torch itself, in place of a library that packs the bits.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saeguard.errors import ArtifactMismatchError
from saeguard.evaluation.subject import Loader, Subject
from saeguard.guardrail import Guardrail
from saeguard.model import decoder_layers, model_fingerprint

BITS = (8, 4)
GROUP = 64


def rounded(values: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """The nearest values (rows, columns) that `bits` bits a weight and one scale a group can hold."""
    steps = 2 ** (bits - 1) - 1
    width = group if values.shape[-1] % group == 0 else values.shape[-1]
    parts = values.float().reshape(-1, width)
    scale = parts.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / steps
    found: Tensor = (parts / scale).round() * scale
    return found.reshape(values.shape).to(values.dtype)


def quantised(loader: Loader, bits: int) -> Loader:
    """A copy of a model with the matrices of its blocks rounded."""

    def load() -> tuple[Any, Any]:
        model, tokenizer = loader.loaded
        model = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in decoder_layers(model).parameters():
                if parameter.dim() == 2:
                    parameter.copy_(rounded(parameter, bits))
        return model, tokenizer

    return Loader(load)


def refusal(guardrail: Guardrail, loader: Loader) -> str | None:
    """What the guardrail says when it is put on another model; None if it does not refuse."""
    try:
        guardrail.check(*loader.loaded)
    except ArtifactMismatchError as error:
        return str(error)
    return None


def moved(subject: Subject, loader: Loader) -> Subject:
    """The subject on another model, under its guardrail or prompt gate as if that had been made there."""
    return replace(subject, loader=loader) if subject.guardrail is None else forced(subject, subject.guardrail, loader)


def forced(subject: Subject, guardrail: Guardrail, loader: Loader) -> Subject:
    """The subject's guardrail on another model, as if it had been calibrated there."""
    other = replace(guardrail, model=model_fingerprint(loader.loaded[0]))
    return Subject.guarded(subject.name, loader, other, normalise="normalise" in subject.identity)
