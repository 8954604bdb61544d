"""Each family's own library writes an SAE and encodes; what we read must give the same features.

The libraries are heavy, so these tests run where they are installed: `pip install eai-sparsify sae-lens`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saeguard.sae.autoencoder import SparseAutoencoder

D, F, K = 16, 64, 5


def stream() -> torch.Tensor:
    return 3 * torch.randn(40, D, generator=torch.Generator().manual_seed(1))


def randomise(module: torch.nn.Module) -> None:
    """Biases are 0 in a fresh SAE, and would hide what is done with them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.dim())))


def test_sparsify(tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(expansion_factor=4, k=K))
    randomise(theirs)
    theirs.save_to_disk(tmp_path / "layers.3")
    encoded = theirs.encode(stream())
    a = torch.zeros(40, F).scatter(1, encoded.top_indices, encoded.top_acts)
    ours = SparseAutoencoder.load(tmp_path / "layers.3")
    torch.testing.assert_close(ours.encode(stream()), a)
    torch.testing.assert_close(ours.decode(a), theirs.decode(encoded.top_acts, encoded.top_indices))


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_sae_lens(tmp_path: Path, architecture: str) -> None:
    saes = pytest.importorskip("sae_lens.saes")
    kinds = {"standard": saes.StandardSAE, "jumprelu": saes.JumpReLUSAE, "topk": saes.TopKSAE}
    configs = {"standard": saes.StandardSAEConfig, "jumprelu": saes.JumpReLUSAEConfig, "topk": saes.TopKSAEConfig}
    extra = {"k": K} if architecture == "topk" else {}
    theirs = kinds[architecture](configs[architecture](d_in=D, d_sae=F, **extra))
    randomise(theirs)
    theirs.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    theirs.save_model(tmp_path)
    ours = SparseAutoencoder.load(tmp_path)
    a = theirs.encode(stream())
    torch.testing.assert_close(ours.encode(stream()), a.to_dense() if a.is_sparse else a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.decode(ours.encode(stream())), theirs.decode(a), rtol=1e-4, atol=1e-4)
    assert ours.layer == 2
