"""The slim form is the full encode, clamp, decode plus error term, on every kind of SAE."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import D_MODEL, make_sae
from reference import FullSAE, authors_clamp, authors_density, full_clamp
from saeguard.clamp import Clamp
from saeguard.gate import Density, Gate, Mean
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder, TopK
from saeguard.sae.scaling import InputScaling
from saeguard.sae.slim import slim
from saeguard.tokens import token_masks

FEATURES = [3, 7, 11, 19, 23, 42]
PRECISE = {"rtol": 1e-5, "atol": 1e-4}
SCALINGS = {
    "layer_norm": InputScaling("layer_norm", 1e-5),
    "unit_norm": InputScaling("unit_norm", 1e-12),
    "rms": InputScaling("rms", 1e-6),
}


def stream(seed: int, *shape: int) -> Tensor:
    """A residual stream of norms around 25."""
    return 5 * torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed))


def full(sae: SparseAutoencoder) -> FullSAE:
    """The reference's form of an SAE."""
    weights = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    scaling = {"normalise": "none" if sae.scaling is None else sae.scaling.kind}
    if isinstance(sae.activation, JumpReLU):
        return FullSAE(*weights, "jumprelu", threshold=sae.activation.threshold, **scaling)
    if isinstance(sae.activation, TopK):
        return FullSAE(*weights, "topk", k=sae.activation.k, **scaling)
    return FullSAE(*weights, "relu", **scaling)


def scaled(sae: SparseAutoencoder, kind: str) -> SparseAutoencoder:
    """An SAE for scaled inputs, whose norm is sqrt(d): the biases of one for norms around 25 are too large for it."""
    return replace(sae, b_enc=sae.b_enc + 3.5, b_dec=5 * sae.b_dec, scaling=SCALINGS[kind])


def slim_clamp(sae: SparseAutoencoder, h: Tensor, features: list[int], clamp: Clamp) -> Tensor:
    """What a guard does at every hot token (tokens, d_model)."""
    a = slim(sae, features)(h)
    hot = (a > 0).any(dim=-1, keepdim=True)
    return torch.where(hot, h + clamp.delta(a, sae.W_dec[features]), h)


@pytest.mark.parametrize("kind", ["dense", "active"])
@pytest.mark.parametrize("c", [0.0, 5.0, 500.0])
def test_slim_form_is_the_full_formulation(sae, kind, c):
    h = stream(1, 60)
    expected = full_clamp(full(sae), h, FEATURES, c, dense=kind == "dense")
    found = slim_clamp(sae, h, FEATURES, Clamp(kind, c, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4 * max(1.0, c / 5))
    assert bool((found != h).any(dim=1).any())
    assert bool((found == h).all(dim=1).any())


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", ["dense", "active"])
@pytest.mark.parametrize("c", [0.0, 5.0, 500.0])
def test_slim_form_is_the_full_formulation_where_each_token_is_scaled(sae, scaling, kind, c):
    sae, h = scaled(sae, scaling), stream(1, 60)
    expected = full_clamp(full(sae), h, FEATURES, c, dense=kind == "dense")
    found = slim_clamp(sae, h, FEATURES, Clamp(kind, c, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4 * max(1.0, c / 5))
    hot = (full(sae).encode(h)[:, FEATURES] > 0).any(dim=1)
    assert 5 < int(hot.sum()) < 60
    assert torch.equal((found == h).all(dim=1), ~hot)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_an_sae_of_scaled_tokens_is_its_formula(sae, scaling):
    sae, h = scaled(sae, scaling), stream(2, 40)
    a = full(sae).encode(h)
    torch.testing.assert_close(sae.encode(h), a, **PRECISE)
    torch.testing.assert_close(sae.reconstruct(h), full(sae).decode_to_units(a, h), **PRECISE)
    torch.testing.assert_close(slim(sae, FEATURES)(h.reshape(2, 20, -1)), a[:, FEATURES].reshape(2, 20, -1), **PRECISE)
    if scaling != "rms":
        torch.testing.assert_close(sae.encode(7 * h), 7 * sae.encode(h), rtol=1e-4, atol=1e-3)


@given(
    seed=st.integers(0, 999),
    features=st.sets(st.integers(0, 63), min_size=1, max_size=12),
    c=st.floats(0, 50),
    data=st.data(),
)
def test_slim_form_for_any_features_and_strength(sae, seed, features, c, data):
    kind = data.draw(st.sampled_from(["dense", "active"]))
    h, ids = stream(seed, 12), sorted(features)
    expected = full_clamp(full(sae), h, ids, c, dense=kind == "dense")
    torch.testing.assert_close(slim_clamp(sae, h, ids, Clamp(kind, c, 1.0)), expected, rtol=1e-5, atol=1e-3)


def test_clamped_features_read_minus_c_in_a_linear_encoder():
    """With decoder rows that the encoder reads back exactly, the clamp leaves pre-activations of -c."""
    eye = torch.eye(4)
    sae = replace(make_sae("relu"), W_enc=eye, b_enc=torch.zeros(4), W_dec=eye, b_dec=torch.zeros(4))
    h = torch.tensor([[2.0, -1.0, 3.0, 0.5]])
    assert slim_clamp(sae, h, [0, 1], Clamp("active", 7.0, 1.0)).tolist() == [[-7.0, -1.0, 3.0, 0.5]]
    assert slim_clamp(sae, h, [0, 1], Clamp("dense", 7.0, 1.0)).tolist() == [[-7.0, -8.0, 3.0, 0.5]]


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_preset_paper_is_the_authors_hook(activation):
    """Density by block over all positions, strict threshold, dense clamp of 500."""
    sae, rows, features = make_sae(activation), stream(4, 8, 30), FEATURES[:3]
    dense_a = torch.stack([full(sae).encode(row) for row in rows])
    densities = authors_density(dense_a.double().numpy(), features)
    threshold = float(sorted(densities)[4])
    gate, encoder = Gate(Density(), Mean(), "block", "attended"), slim(sae, features)
    ids = torch.full((8, 30), 9)
    masks = token_masks(ids, ids > 0, torch.tensor([0]))
    a = encoder(rows)
    _, statistics = gate.read(gate.accumulator.start(8), rows, a > 0, masks)
    triggered = gate.decide(statistics, threshold, torch.zeros(8, dtype=torch.bool))
    hot = (a > 0).any(dim=-1) & gate.eligible(masks) & triggered
    found = torch.where(hot[..., None], rows + Clamp("dense", 500.0, 1.0).delta(a, sae.W_dec[features]), rows)
    torch.testing.assert_close(found, authors_clamp(full(sae), rows, features, 500.0, threshold), rtol=1e-4, atol=1e-2)
    assert 0 < int(triggered[:, -1].sum()) < 5


@pytest.mark.parametrize("tokens", [1, 3, 64, 513])
def test_slim_activations_are_the_saes(sae, tokens):
    h = stream(tokens, tokens)
    torch.testing.assert_close(slim(sae, FEATURES)(h), sae.encode(h)[:, FEATURES], **PRECISE)


@pytest.mark.parametrize("tokens", [1, 2, 600])
def test_exact_topk_agrees_on_every_token_although_columns_are_multiplied_apart(tokens):
    sae = replace(make_sae("topk", d_model=576, d_sae=1001), activation=TopK(32), b_enc=torch.zeros(1001))
    ids = torch.randperm(1001, generator=torch.Generator().manual_seed(1))[:40].sort().values.tolist()
    h = 5 * torch.randn(600, 576, generator=torch.Generator().manual_seed(0))
    encoder = slim(sae, ids)
    found = torch.cat([encoder(piece) for piece in h.split(tokens)])
    assert torch.equal(found > 0, torch.cat([sae.encode(piece) for piece in h.split(tokens)])[:, ids] > 0)


def test_topk_of_all_features_is_relu():
    sae = make_sae("topk")
    everything = replace(sae, activation=TopK(sae.d_sae))
    h = stream(0, 20)
    torch.testing.assert_close(slim(everything, FEATURES)(h), everything.encode(h)[:, FEATURES], **PRECISE)


def test_bfloat16_streams_are_encoded_in_float32(sae):
    h = stream(0, 2, 9).bfloat16()
    found = slim(sae, FEATURES)(h)
    assert found.dtype == torch.float32
    assert found.shape == (2, 9, len(FEATURES))
    torch.testing.assert_close(found, slim(sae, FEATURES)(h.float()))
