"""Whether the model's dtype changes which features fire: the same tokens with a copy of the model in another dtype."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from saeguard.doctor.figures import Precision
from saeguard.doctor.reading import Subject, read
from saeguard.errors import SelectionError
from saeguard.selection import SelectionRule, select
from saeguard.statistics import FeatureStatistics
from saeguard.windows import Window

COPIED_PARAMETERS = 2_000_000_000
"""Larger models are not copied."""
SELECTED = SelectionRule(n=5)


def precisions(
    subject: Subject, windows: Sequence[Window], texts: Mapping[str, FeatureStatistics]
) -> tuple[Precision, ...]:
    """One comparison a dtype; none where the model is too large, quantised or spread over devices."""
    model = subject.model
    dtypes = {parameter.dtype for parameter in model.parameters()}
    devices = {parameter.device for parameter in model.parameters()}
    size = sum(parameter.numel() for parameter in model.parameters())
    one = len(dtypes) == len(devices) == 1 and not any(device.type == "meta" for device in devices)
    if not one or not dtypes <= set(_dtypes("cuda")) or size > COPIED_PARAMETERS:
        return ()
    own, ids = dtypes.pop(), selected_features(texts)
    before = _activations(subject, windows)
    found = []
    for dtype in _dtypes(devices.pop().type):
        if dtype != own:
            cast: nn.Module = copy.deepcopy(model).to(dtype)
            after = _activations(replace(subject, model=cast), windows)
            found.append(_compare(before, after, ids, str(own), str(dtype)))
    return tuple(found)


def selected_features(texts: Mapping[str, FeatureStatistics]) -> list[int]:
    """Features that a guardrail against one of the texts would select, for each in turn; none where there is one."""
    found: set[int] = set()
    for name, statistics in texts.items():
        rest = {other: its for other, its in texts.items() if other != name}
        with suppress(SelectionError):
            found |= {feature.id for feature in select(statistics, rest, SELECTED)} if rest else set()
    return sorted(found)


def overlap(before: Tensor, after: Tensor) -> float:
    """sum min / sum max of two non-negative tensors: the Jaccard index where they hold 0 and 1. 1 where both are 0."""
    either = float(torch.maximum(before, after).sum())
    return float(torch.minimum(before, after).sum()) / either if either else 1.0


def _activations(subject: Subject, windows: Sequence[Window]) -> Tensor:
    return subject.sae.encode(read(subject, windows).rows[subject.layer].x)


def _compare(before: Tensor, after: Tensor, ids: list[int], own: str, other: str) -> Precision:
    fired = [(a > 0).float() for a in (before, after)]
    return Precision(
        dtype=own.removeprefix("torch."),
        other=other.removeprefix("torch."),
        jaccard=overlap(*fired),
        selected=overlap(*(a[:, ids] for a in fired)) if ids else None,
        weighted=overlap(before, after),
    )


def _dtypes(device: str) -> tuple[torch.dtype, ...]:
    """Those worth comparing: float16 only where hardware computes in it."""
    return (torch.float32, torch.bfloat16, *([torch.float16] if device == "cuda" else []))
