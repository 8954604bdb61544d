"""The values a choice can take, apart from the code that acts on them, so that the command line starts without it."""

from __future__ import annotations

from typing import Literal

Action = Literal["clamp", "refuse", "monitor"]
ClampKind = Literal["dense", "active"]
GateChoice = Literal["auto", "density", "evidence", "probe"]
Moment = Literal["running", "block"]
TopKMode = Literal["exact", "threshold"]
