"""The values a choice can take, apart from the code that acts on them, so that the command line starts without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Action = Literal["clamp", "refuse", "monitor"]
PromptAction = Literal["refuse", "corrupt", "monitor"]
"""What a prompt gate does with a prompt that triggers it."""
ClampKind = Literal["dense", "active"]
GateChoice = Literal["auto", "density", "evidence", "probe"]
Role = Literal["topic", "near", "far"]
"""What a judged domain is to the topic."""
Moment = Literal["running", "block"]
Reach = Literal["all", "onward"]
"""Which tokens of a triggered sequence are clamped where they are hot: all of them, or those from the trigger on."""
TopKMode = Literal["exact", "threshold"]

Hook = Literal["resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"]
"""Places in a decoder block, in the order of the data: the residual stream before the block, the heads' outputs before
and after their projection, the residual stream between attention and MLP, what goes into the MLP (normalised) and what
it adds, the residual stream after the block."""

REFUSAL = "I cannot help with that topic."
"""What takes the place of an answer under the action `refuse`."""


@dataclass(frozen=True)
class GivenFeatures:
    """Features to use in place of selection, in rank order: by hand, or found by their `explanations` (by id).

    `origin` says how they were found; it goes into the guardrail.
    """

    ids: tuple[int, ...]
    explanations: Mapping[int, str] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=lambda: {"by": "ids"})
