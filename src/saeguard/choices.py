"""The values a choice can take, apart from the code that acts on them, so that the command line starts without it."""

from __future__ import annotations

from typing import Literal

Action = Literal["clamp", "refuse", "monitor"]
ClampKind = Literal["dense", "active"]
GateChoice = Literal["auto", "density", "evidence", "probe"]
Moment = Literal["running", "block"]
TopKMode = Literal["exact", "threshold"]

Hook = Literal["resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"]
"""Places in a decoder block, in the order of the data: the residual stream before the block, the heads' outputs before
and after their projection, the residual stream between attention and MLP, what goes into the MLP (normalised) and what
it adds, the residual stream after the block."""

REFUSAL = "I cannot help with that topic."
"""What takes the place of an answer under the action `refuse`."""
