"""The doctor on SmolLM2 and its SAE: intact it fits, in both dtypes, on every domain; each damage is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saeguard import errors, fit
from saeguard.config import PRESETS
from saeguard.corpus import Corpus
from saeguard.doctor.diagnosis import diagnose
from saeguard.doctor.reading import Subject
from saeguard.embedded import LAYER, TOPIC, embedded_model, embedded_sae, starter_set
from saeguard.sae.autoencoder import JumpReLU

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def loaded():
    return embedded_model(device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def texts():
    starter = starter_set()
    return [Corpus.of(name, "retain", path) for name, path in {TOPIC: starter.forget, **starter.retain}.items()]


@pytest.fixture(scope="module")
def sae():
    """Without its metadata, so that only the figures speak."""
    return replace(embedded_sae(), metadata={})


@pytest.fixture
def examine(loaded, texts):
    def examine(sae, layer=LAYER):
        return diagnose(Subject(*loaded, sae, layer), texts, tokens=2_000, thorough=False)

    return examine


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_intact_it_fits(dtype, texts):
    found = diagnose(Subject(*embedded_model(device="cpu", dtype=dtype), embedded_sae(), LAYER), texts, tokens=2_000)
    assert found.verdict == "fits"
    figures = found.figures
    assert min(row.ordinary for row in figures.texts.values()) > 0.7
    assert figures.chat.ordinary > 0.7
    assert figures.loss_recovered > 0.95
    assert figures.precision[0].jaccard > 0.95
    assert figures.corrections.layer.explained_variance < figures.corrections.as_is.explained_variance


@pytest.mark.parametrize("domain", sorted([TOPIC, *starter_set().retain]))
def test_intact_it_fits_each_domain_alone(loaded, texts, domain):
    alone = [corpus for corpus in texts if corpus.name == domain]
    found = diagnose(Subject(*loaded, embedded_sae(), LAYER), alone, tokens=600, thorough=False)
    assert found.verdict == "fits"


@pytest.mark.parametrize("layer", [5, 7, 20])
def test_a_wrong_layer(examine, sae, layer):
    found = examine(sae, layer)
    assert (found.verdict, found.mismatch.what) == ("does not fit", "layer that explains most")
    assert found.figures.corrections.layer.value == LAYER


@pytest.mark.parametrize("factor", [0.241, 4.0])
def test_unfolded_normalisation(examine, sae, factor):
    """0.241 is sqrt(d_model) over the mean residual norm, as SAELens and Llama Scope scale."""
    threshold = JumpReLU(sae.activation.threshold * factor)
    found = examine(replace(sae, b_enc=sae.b_enc * factor, b_dec=sae.b_dec * factor, activation=threshold))
    assert (found.verdict, found.mismatch.what) == ("does not fit", "scale of the SAE's input")
    assert found.figures.corrections.scale.value == pytest.approx(factor, rel=0.15)


@pytest.mark.parametrize(("times", "said"), [(1, "with b_dec subtracted"), (-1, "with b_dec not subtracted")])
def test_b_dec_at_the_input(examine, sae, times, said):
    """The file says `apply_b_dec_to_input` and the loader does not do it, or the reverse."""
    found = examine(replace(sae, b_enc=sae.b_enc + times * sae.b_dec @ sae.W_enc))
    assert (found.verdict, found.mismatch.what) == ("does not fit", "b_dec at the SAE's input")
    assert said in found.mismatch.found


@pytest.mark.parametrize("whole", [True, False])
def test_a_shuffled_encoder(examine, sae, whole):
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(0))
    moved = replace(sae, W_enc=sae.W_enc[:, order])
    if whole:
        moved = replace(moved, b_enc=sae.b_enc[order], activation=JumpReLU(sae.activation.threshold[order]))
    found = examine(moved)
    assert (found.verdict, found.mismatch.what) == ("does not fit", "encoder and decoder")


def test_an_sae_of_another_model(examine, sae):
    turn = torch.linalg.qr(torch.randn(sae.d_model, sae.d_model, generator=torch.Generator().manual_seed(0)))[0]
    found = examine(replace(sae, W_enc=turn.T @ sae.W_enc, W_dec=sae.W_dec @ turn, b_dec=sae.b_dec @ turn))
    assert (found.verdict, found.mismatch.what) == ("does not fit", "explained variance of ordinary tokens")


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_fit_refuses_a_neighbouring_layer(loaded, sae, preset):
    starter = starter_set()
    with pytest.raises(errors.SAEMismatchError, match="layer 6"):
        fit(*loaded, sae, layer=LAYER + 1, forget=starter.forget, retain=starter.retain, config=PRESETS[preset])
