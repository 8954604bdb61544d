"""`Rule`: one topic's guardrail. Which features to look at, when to act and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from saeguard.choices import Action
from saeguard.clamp import Clamp
from saeguard.gate import Gate
from saeguard.sae.slim import SlimEncoder
from saeguard.selection import SelectedFeature


@dataclass(frozen=True)
class Rule:
    """One topic's guardrail: features, gate, threshold and clamp. `evidence` holds the calibration figures (JSON)."""

    name: str
    selected: tuple[SelectedFeature, ...]
    encoder: SlimEncoder
    decoder: Tensor
    gate: Gate
    threshold: float
    clamp: Clamp
    action: Action = "clamp"
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> tuple[int, ...]:
        """Feature ids in rank order."""
        return tuple(feature.id for feature in self.selected)
