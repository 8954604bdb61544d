"""What a guardrail costs: forward passes with and without it, in pairs.

Overhead = guarded / unguarded - 1, the median over pairs run one after the other, so that a machine whose speed
drifts does not bend it. The full formulation (encode all features, clamp, decode, add the error term) is timed
beside the slim one. The gate is made to trigger, so the cost of the clamp is in the figure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.guardrail import Guardrail
from saeguard.hooks import at
from saeguard.model import layer_device, port_at
from saeguard.sae.autoencoder import SparseAutoencoder

PREFILL_TOKENS = (256, 512, 1024)
DECODE_BATCHES = (1, 8)
DECODE_PAST = 64
Mode = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Overhead:
    """Median milliseconds of one case, and the median of the paired ratios less one."""

    tokens: int
    batch: int
    unguarded_ms: float
    guarded_ms: float
    full_sae_ms: float
    overhead: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return dict(vars(self))


def overhead(
    model: Any, tokenizer: Any, guardrail: Guardrail, sae: SparseAutoencoder, *, pairs: int = 15,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, list[dict[str, float]]]:  # fmt: skip
    """`{"prefill": [...], "decode": [...]}` with one row a length or a batch size."""
    always = _always_triggered(guardrail)
    modes: dict[str, Mode] = {
        "unguarded": nullcontext,
        "guarded": lambda: always.attach(model, tokenizer),
        "full": lambda: _full_sae(model, sae, always),
    }
    rows: dict[str, list[dict[str, float]]] = {"prefill": [], "decode": []}
    for tokens in PREFILL_TOKENS:
        times: dict[str, list[float]] = {name: [] for name in modes}
        for _ in range(pairs):
            for name, mode in modes.items():
                times[name].append(_prefill(model, mode, tokens))
            advance(1)
        rows["prefill"].append(_row(times, tokens, 1))
    for batch in DECODE_BATCHES:
        times = {name: [] for name in modes}
        for mode in modes.values():
            _decode(model, mode, batch, steps=2)
        for _ in range(pairs):
            for name, mode in modes.items():
                times[name].append(_decode(model, mode, batch, steps=8))
            advance(1)
        rows["decode"].append(_row(times, 1, batch))
    return rows


def _row(times: dict[str, list[float]], tokens: int, batch: int) -> dict[str, float]:
    ratios = [guarded / plain for guarded, plain in zip(times["guarded"], times["unguarded"], strict=True)]
    plain, guarded, full = (1000 * median(times[name]) for name in ("unguarded", "guarded", "full"))
    return Overhead(tokens, batch, plain, guarded, full, median(ratios) - 1).as_dict()


def _prefill(model: Any, mode: Mode, tokens: int) -> float:
    ids = _some_ids(model, 1, tokens)
    with mode(), torch.inference_mode():
        return _timed(model, lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1))


def _decode(model: Any, mode: Mode, batch: int, *, steps: int) -> float:
    """Seconds a decoding step takes, after a short prompt."""
    ids = _some_ids(model, batch, DECODE_PAST)
    with mode(), torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

        def run() -> None:
            for _ in range(steps):
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

        return _timed(model, run) / steps


def _timed(model: Any, run: Callable[[], Any]) -> float:
    synchronise: Callable[[], None] = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def _some_ids(model: Any, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(100, 1000, (batch, tokens), generator=generator).to(model.device)


def _always_triggered(guardrail: Guardrail) -> Guardrail:
    rules = tuple(replace(rule, threshold=-1.0, action="clamp") for rule in guardrail.rules)
    return replace(guardrail, rules=rules)


@contextmanager
def _full_sae(model: nn.Module, sae: SparseAutoencoder, guardrail: Guardrail) -> Iterator[None]:
    """The formulation with the whole SAE, at the tokens where a selected feature is active."""
    sae = sae.to(layer_device(model, guardrail.layer))
    ids, c, read = list(guardrail.rule.features), guardrail.clamp.c, guardrail.point
    encoded: list[Tensor] = []

    def see(h: Tensor) -> None:
        encoded[:] = [sae.encode(h)]

    def change(h: Tensor) -> Tensor:
        a = encoded[0]
        clamped = a.clone()
        clamped[..., ids] = -c
        new = sae.decode(clamped) + (h - sae.decode(a))
        hot = (a[..., ids] > 0).any(dim=-1, keepdim=True)
        return torch.where(hot, new.to(h.dtype), h)

    with at(port_at(model, read), see), at(port_at(model, replace(read, hook=guardrail.hook_out)), change):
        yield
