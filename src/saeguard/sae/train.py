"""Train an SAE on a residual stream: sparsity by one threshold for all features, found as it learns.

A BatchTopK SAE (arXiv 2412.06410) keeps the k x batch largest pre-activations of a batch. Here the
threshold that does so is tracked as a running quantile, so that training and use are the same function:
what is saved is a JumpReLU SAE, whose features need no comparison with other features, and of which a
guardrail therefore carries only the few it uses. Why no library: docs/dependencies.md.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saeguard.config import SAETraining
from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder

WARMUP_STEPS = 50
DECAY_SHARE = 0.2
SILENT_STEPS = 100
AUXILIARY_WEIGHT = 1 / 32
AUXILIARY_K = 256
CHECKPOINT_STEPS = 100
QUANTILE_SAMPLE = 262_144


class _Trainee(nn.Module):
    """The weights while they learn, on inputs of zero mean and unit variance in each dimension."""

    def __init__(self, d_model: int, config: SAETraining) -> None:
        super().__init__()
        directions = nn.functional.normalize(torch.randn(config.width, d_model), dim=1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(config.width))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("silent", torch.zeros(config.width))
        self.threshold: Tensor
        self.silent: Tensor

    def encode(self, x: Tensor) -> Tensor:
        return x @ self.W_enc + self.b_enc.to(x.dtype)

    def track_threshold(self, pre: Tensor, k: int, step: int) -> None:
        """Move the threshold towards the value that k features a token exceed."""
        flat = pre.detach().flatten()
        sample = flat[torch.randint(flat.numel(), (min(QUANTILE_SAMPLE, flat.numel()),))].float()
        keep = max(1, round(sample.numel() * k / pre.shape[-1]))
        now = sample.topk(keep).values[-1].clamp(min=0)
        self.threshold.lerp_(now, max(0.02, 1 / (step + 1)))

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


def train(
    residuals: Tensor,
    config: SAETraining,
    *,
    metadata: dict[str, Any],
    device: torch.device | str = "cpu",
    on_step: Callable[[int], None] = lambda tokens: None,
    checkpoint: Path | None = None,
) -> SparseAutoencoder:
    """An SAE for residual streams like the rows of `residuals` (tokens, d_model), in plain units, trained on `device`.

    With `checkpoint`, a killed run goes on from there; the file is removed at the end.
    """
    torch.manual_seed(config.seed)
    mean, scale = (moment.to(device) for moment in _moments(residuals))
    trainee = _Trainee(residuals.shape[1], config).to(device)
    steps = max(1, config.token_passes // config.batch)
    optimizer = torch.optim.Adam(trainee.parameters(), lr=config.learning_rate)
    order = torch.randperm(len(residuals))
    first = _restore(checkpoint, trainee, optimizer)
    on_step(first * config.batch)
    for step in range(first, steps):
        start = step * config.batch % max(1, len(order) - config.batch)
        rows = order[start : start + config.batch]
        x = ((residuals[rows].to(device).float() - mean) / scale).bfloat16()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(step, steps)
        optimizer.zero_grad(set_to_none=True)
        _loss(trainee, x, config, step).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        trainee.normalise_decoder()
        on_step(len(rows))
        if checkpoint and (step + 1) % CHECKPOINT_STEPS == 0:
            _keep(checkpoint, trainee, optimizer, step + 1)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return _plain_units(trainee, mean, scale, metadata)


def _keep(path: Path, trainee: _Trainee, optimizer: torch.optim.Adam, step: int) -> None:
    tensors = {f"trainee.{name}": tensor for name, tensor in trainee.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in state.items()}
    tensors |= {"random": torch.get_rng_state(), "step": torch.tensor(step)}
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary)
    temporary.replace(path)


def _restore(path: Path | None, trainee: _Trainee, optimizer: torch.optim.Adam) -> int:
    """The step to go on from: 0 without a checkpoint. Raises `SAEError` for one that cannot be read."""
    if path is None or not path.is_file():
        return 0
    try:
        kept = load_file(path)
        trainee.load_state_dict({name: kept[f"trainee.{name}"] for name in trainee.state_dict()})
        groups = optimizer.state_dict()["param_groups"]
        states = {
            i: {name: kept[f"optimizer.{i}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
            for group in groups
            for i in group["params"]
        }
        optimizer.load_state_dict({"state": states, "param_groups": groups})
        torch.set_rng_state(kept["random"])
        return int(kept["step"])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise SAEError(
            f"cannot go on from {path}: damaged, or of another training ({error}). Delete it to train from the start."
        ) from error


def _loss(trainee: _Trainee, x: Tensor, config: SAETraining, step: int) -> Tensor:
    """Squared error a token over its variance, plus the auxiliary loss that revives silent features."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        pre = trainee.encode(x)
        trainee.track_threshold(pre, config.k, step)
        a = torch.where(pre > trainee.threshold, pre, 0)
        error = x - a @ trainee.W_dec
        loss = error.float().pow(2).mean()
        fired = (a > 0).any(dim=0)
        trainee.silent = torch.where(fired, 0, trainee.silent + 1)
        dead = (trainee.silent > SILENT_STEPS).nonzero().flatten()
        if len(dead) == 0:
            return loss
        values, ids = pre[:, dead].topk(min(AUXILIARY_K, len(dead)), dim=-1)
        revived = torch.zeros(len(x), len(dead), dtype=values.dtype, device=x.device).scatter(-1, ids, values.relu())
        residue = error.detach() - revived @ trainee.W_dec[dead]
        return loss + AUXILIARY_WEIGHT * residue.float().pow(2).mean()


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, (steps - step) / max(1, DECAY_SHARE * steps))


def _moments(residuals: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each dimension, from at most 100,000 rows."""
    rows = residuals[:: max(1, len(residuals) // 100_000)].float()
    return rows.mean(dim=0), rows.std(dim=0).clamp(min=1e-6)


def _plain_units(trainee: _Trainee, mean: Tensor, scale: Tensor, metadata: dict[str, Any]) -> SparseAutoencoder:
    """Fold the scaling of the inputs into the weights, decoder rows of unit norm."""
    with torch.no_grad():
        W_dec = trainee.W_dec * scale
        norm = W_dec.norm(dim=1)
        W_enc = trainee.W_enc / scale[:, None] * norm
        b_enc = trainee.b_enc * norm - mean @ W_enc
        threshold = trainee.threshold.float() * norm
        return SparseAutoencoder(
            W_enc=W_enc, b_enc=b_enc, W_dec=W_dec / norm[:, None], b_dec=mean,
            activation=JumpReLU(threshold), source="trained here", metadata=metadata,
        )  # fmt: skip
