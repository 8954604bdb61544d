"""How much memory a run takes, estimated from the model's shapes before any weight is read.

    weights            4 bytes each (float32 while they are trained), once more for the model before where it is kept
    training           12 bytes for each trained weight: its gradient and AdamW's two moments
    activations        for each token of forget and retain text in a step, for each block that is run,
                       (ACTIVATIONS d_model + 3 d_ff) 4 bytes, and LOGITS vocabulary 4 bytes where there are logits

The first two are exact. The third is what a decoder block keeps for the backward pass, roughly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from saeguard.errors import DoesNotFitError

ACTIVATIONS, LOGITS = 16, 4
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Needs:
    """The numbers an estimate is made of: weights, those that are trained, and what a token costs."""

    weights: int
    trained: int
    copies: int
    tokens: int
    blocks: int
    d_model: int
    d_ff: int
    vocabulary: int

    @property
    def bytes(self) -> int:
        """The estimate."""
        token = self.blocks * (ACTIVATIONS * self.d_model + 3 * self.d_ff) + LOGITS * self.vocabulary
        return 4 * self.weights * self.copies + 12 * self.trained + 4 * token * self.tokens


def available(device: str) -> int:
    """Bytes that are free on a device; in a container, what its limit leaves."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    free = int(psutil.virtual_memory().available)
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(0, limit - used))


def size(model: nn.Module) -> int:
    """Bytes that a loaded model takes."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def check(needs: Needs, device: str, *, held: int = 0) -> None:
    """Raises `DoesNotFitError` where the estimate is above what is free, `held` by the run itself included."""
    free = available(device) + held
    if needs.bytes > free:
        raise DoesNotFitError.mismatch(
            f"memory on {device} for this run, estimated at {gigabytes(needs.bytes)}",
            found=f"{gigabytes(free)} free", expected=f"{gigabytes(needs.bytes)} "
            f"({gigabytes(4 * needs.weights * needs.copies)} weights, {gigabytes(12 * needs.trained)} training)",
            fix="Train adapters (--lora-rank 8), compute a batch in parts (--accumulate), or shorten --max-tokens.",
        )  # fmt: skip


def gigabytes(count: int) -> str:
    """For people."""
    return f"{count / 1e9:.1f} GB"


def _number(path: Path) -> int | None:
    try:
        text = path.read_text("ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
