"""What a guardrail keeps of its SAE: little, and all that its activations need."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import make_guardrail, make_sae
from saeguard import Guardrail, fit
from saeguard.bench.load import FORMATS, Random, write_format
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.sae.scaling import InputScaling
from saeguard.sae.slim import slim
from topics import LAYER, SMALL, corpora, passages


def test_a_guardrail_of_twenty_features_of_a_wide_sae_is_under_500_kilobytes(llama, tokenizer, tmp_path):
    """With the evidence of a fit on 13 retain corpora, on passages of 60 words."""
    forget, _ = corpora()
    retain = {
        f"retained corpus {i}": passages("kitchen" if i % 2 else "garden", 14, words=40, seed=i) for i in range(13)
    }
    config = replace(SMALL, n=20, p_ratio=0.0, lengths=(48,), sample=2_000)
    fitted = fit(llama, tokenizer, make_sae("jumprelu"), layer=LAYER, forget=forget, retain=retain, config=config)
    path = write_format(tmp_path / "sae", FORMATS["SAELens"](Random.of(2304, 1024)))
    sae, ids = SparseAutoencoder.load(path), list(range(0, 1000, 50))
    rule = replace(fitted.rule, encoder=slim(sae, ids), decoder=sae.W_dec[ids])
    replace(fitted, rules=(rule,)).save_pretrained(tmp_path / "guard")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "guard").iterdir()}
    assert len(rule.features) == 20
    assert sizes["guardrail.safetensors"] > 2 * 20 * 2304 * 4
    assert sizes["guardrail.json"] > 80_000
    assert sum(sizes.values()) < 500_000, sizes


@pytest.mark.parametrize("kind", ["layer_norm", "unit_norm", "rms"])
@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_the_scaling_of_tokens_is_saved_and_read(llama, tokenizer, tmp_path, activation, kind):
    sae = replace(make_sae(activation), scaling=InputScaling(kind, 1e-5))
    guardrail = make_guardrail(llama, tokenizer, sae, 2)
    guardrail.save_pretrained(tmp_path / "guard")
    found = Guardrail.from_pretrained(tmp_path / "guard")
    h = 5 * torch.randn(3, 20, sae.d_model, generator=torch.Generator().manual_seed(1))
    assert found.rule.encoder.scaling == sae.scaling
    assert torch.equal(found.rule.encoder(h), guardrail.rule.encoder(h))
    assert torch.equal(found.rule.encoder.to("cpu")(h), guardrail.rule.encoder(h))
    assert sae.fingerprint() != replace(sae, scaling=None).fingerprint()
    assert not torch.equal(
        found.rule.encoder(h), make_guardrail(llama, tokenizer, make_sae(activation), 2).rule.encoder(h)
    )
