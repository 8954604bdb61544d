"""How good an SAE is on a model: explained variance, L0, dead features, loss recovered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saeguard.activations import ResidualBatch, residual_batches
from saeguard.hookpoints import HookPoint
from saeguard.hooks import at
from saeguard.model import layer_device, port_at
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.windows import Window


@dataclass(frozen=True)
class SAEQuality:
    """Figures over the valid tokens of some windows.

    `explained_variance` is 1 - sum |h - h_hat|^2 / sum |h - mean h|^2. In some models a few dimensions hold most of
    that variance; `explained_variance_median` is the median over the dimensions of each one's own explained variance,
    in which they count as much as any other. `loss_recovered` is (zero - spliced) / (zero - clean): the share of
    next-token loss kept when the SAE's output replaces the residual stream, against replacing it by zero.
    """

    tokens: int
    explained_variance: float
    explained_variance_median: float
    l0: float
    dead_share: float
    loss_clean: float
    loss_spliced: float
    loss_zero: float
    loss_recovered: float

    def as_dict(self) -> dict[str, float]:
        """The figures by name."""
        return asdict(self)


def measure(
    model: nn.Module, tokenizer: Any, sae: SparseAutoencoder, layer: int, windows: Iterable[Window]
) -> SAEQuality:
    """Run windows through model and SAE and measure."""
    sae = sae.to(layer_device(model, layer))
    total_l0, count = 0.0, 0
    error, first, second = torch.zeros(3, sae.d_model).double()
    fired = torch.zeros(sae.d_sae, dtype=torch.bool)
    losses = torch.zeros(3).double()
    for batch in residual_batches(model, tokenizer, layer, windows):
        h = batch.hidden[batch.masks.valid].float()
        a = sae.encode(h)
        error += (h - sae.reconstruct(h)).double().pow(2).sum(dim=0).cpu()
        total_l0 += float((a > 0).sum())
        fired |= (a > 0).any(dim=0).cpu()
        count += len(h)
        first += h.double().sum(dim=0).cpu()
        second += h.double().pow(2).sum(dim=0).cpu()
        sums = [_loss(model, sae, layer, batch, splice) for splice in SPLICES]
        losses += torch.tensor(sums).double()
    clean, spliced, zero = (losses / count).tolist()
    variance = second - first.pow(2) / count
    return SAEQuality(
        tokens=count,
        explained_variance=1 - float(error.sum() / variance.sum()),
        explained_variance_median=1 - float((error / variance).nanmedian()),
        l0=total_l0 / count,
        dead_share=1 - float(fired.float().mean()),
        loss_clean=clean,
        loss_spliced=spliced,
        loss_zero=zero,
        loss_recovered=(zero - spliced) / (zero - clean),
    )


SPLICES = ("clean", "spliced", "zero")


def _loss(model: nn.Module, sae: SparseAutoencoder, layer: int, batch: ResidualBatch, splice: str) -> float:
    """Summed next-token loss at the valid tokens, with the residual stream kept, rebuilt or zeroed there.

    One sequence after the other: a batch's logits over a large vocabulary would take gigabytes in float32.
    """
    ids, attended, valid = batch.input_ids, batch.masks.attended, batch.masks.valid

    def change(h: Tensor) -> Tensor | None:
        if splice == "clean":
            return None
        new = torch.zeros_like(h) if splice == "zero" else sae.reconstruct(h).to(h.dtype)
        return torch.where(valid[..., None], new, h)

    with torch.inference_mode(), at(port_at(model, HookPoint(layer)), change):
        logits = model(input_ids=ids, attention_mask=attended.long(), use_cache=False).logits
        token_losses = torch.stack(
            [
                nn.functional.cross_entropy(row[:-1].float(), its[1:], reduction="none")
                for row, its in zip(logits, ids, strict=True)
            ]
        )
    return float((token_losses * (valid[:, :-1] & valid[:, 1:])).sum())
