"""The clamp: setting features to -c in the residual stream, in the slim form.

    h' = h + sum_{j in S} (-c - a_j) W_dec[j]          at hot tokens of triggered sequences

`dense` (the authors' code) sums over all of S, also features that are inactive at the token; `active` only over
those that are active. Since the decoder is linear and the error term h - decode(a) is added back, this equals
decode(clamped a) + h - decode(a) exactly, and needs n decoder rows instead of the SAE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saeguard.choices import ClampKind


@dataclass(frozen=True)
class Clamp:
    """What is done at hot tokens: `c` in units of feature activation, `strength` = c over the median residual norm."""

    kind: ClampKind
    c: float
    strength: float

    def delta(self, a: Tensor, decoder: Tensor) -> Tensor:
        """What to add to the residual stream (tokens, d_model), for activations (tokens, n) and rows (n, d_model)."""
        target = torch.full_like(a, -self.c) if self.kind == "dense" else torch.where(a > 0, -self.c, 0.0)
        return (target - a) @ decoder
