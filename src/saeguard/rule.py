"""`Rule`: one topic's guardrail. Which features to look at, when to act and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from saeguard.choices import Action, Reach
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
    reach: Reach = "all"
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clamps(self) -> bool:
        """Whether a trigger changes anything."""
        return self.action != "monitor"

    @property
    def reaches_back(self) -> bool:
        """Whether hot tokens in front of a trigger are clamped too; a trigger that does not last reaches nothing."""
        return self.reach == "all" and self.gate.latch and self.clamps

    @property
    def features(self) -> tuple[int, ...]:
        """Feature ids in rank order."""
        return tuple(feature.id for feature in self.selected)
