"""Places in a block, by the names of TransformerLens, of modules, and of the folders SAEs are in."""

from __future__ import annotations

import pytest
import torch

from conftest import make_sae
from saeguard.errors import SAEError
from saeguard.sae.formats.hookname import Site, input_scaling, place, site

GEMMA = "google/gemma-2-2b"
NAMES = {
    "blocks.3.hook_resid_pre": Site(3, "resid_pre"),
    "blocks.3.hook_resid_mid": Site(3, "resid_mid"),
    "blocks.30.hook_resid_post": Site(30, "resid_post"),
    "blocks.3.hook_mlp_in": Site(3, "resid_mid"),
    "blocks.3.mlp.hook_in": Site(3, "mlp_in"),
    "blocks.3.hook_mlp_out": Site(3, "mlp_out"),
    "blocks.3.hook_attn_out": Site(3, "attn_out"),
    "blocks.3.attn.hook_z": Site(3, "attn_z"),
    "blocks.3.hook_z": Site(3, "attn_z"),
    "blocks.3.ln2.hook_normalized": Site(3, "resid_mid", normalised=True),
    "model.layers.12": Site(12, "resid_post"),
    "model.layers.12.output": Site(12, "resid_post"),
    "model.layers.12.input": Site(12, "resid_pre"),
    "model.language_model.layers.12.output": Site(12, "resid_post"),
    "model.layers.12.self_attn.o_proj.input": Site(12, "attn_z"),
    "model.layers.12.self_attn.o_proj.output": Site(12, "attn_out"),
    "model.layers.12.self_attn": Site(12, "attn_out"),
    "model.layers.12.mlp": Site(12, "mlp_out"),
    "model.layers.12.mlp.input": Site(12, "mlp_in"),
    "model.layers.12.post_attention_layernorm.input": Site(12, "resid_mid"),
    "model.layers.12.post_attention_layernorm.output": Site(12, "mlp_in"),
    "model.layers.12.post_feedforward_layernorm.output": Site(12, "mlp_out"),
    "model.layers.12.pre_feedforward_layernorm.output": Site(12, "mlp_in"),
    "layers.10": Site(10, "resid_post"),
    "layers.10.mlp": Site(10, "mlp_out"),
    "h.5": Site(5, "resid_post"),
    "transformer.h.5": Site(5, "resid_post"),
    "transformer.h.5.attn.c_proj.input": Site(5, "attn_z"),
    "gpt_neox.layers.3": Site(3, "resid_post"),
    "gpt_neox.layers.3.attention.dense.input": Site(3, "attn_z"),
    "model.decoder.layers.3.self_attn.out_proj.input": Site(3, "attn_z"),
    "resid_post_layer_4": Site(4, "resid_post"),
    "attention_out_layer_4": Site(4, "attn_out"),
    "mlp_layer0": Site(0, "mlp_out"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_place(name):
    assert site(name) == NAMES[name]


@pytest.mark.parametrize(
    "name",
    [
        "", "hook_embed", "embed_tokens", "blocks.3.mlp.hook_post", "blocks.3.attn.hook_q", "encoder.3",
        "model.layers.x.output", "model.layers.3.mlp.down_proj", "blocks.3.hook_resid_post.hook_scale", "lm_head",
    ],
)  # fmt: skip
def test_a_name_that_means_no_place_is_an_error_that_shows_it(name):
    with pytest.raises(SAEError, match="hook point of the SAE") as caught:
        site(name)
    assert caught.value.found == repr(name)


def test_models_with_norms_on_both_sides_call_other_places_by_the_same_names():
    assert site("model.layers.3.post_attention_layernorm.output", GEMMA) == Site(3, "attn_out")
    assert site("model.layers.3.output", GEMMA) == Site(3, "resid_post")
    assert site("blocks.3.hook_mlp_out", GEMMA) == Site(3, "mlp_out")
    for before_a_norm in ("layers.3.mlp", "layers.3.self_attn", "attn_out_layer_3"):
        with pytest.raises(SAEError, match="hook point"):
            site(before_a_norm, "gemma-3-1b")


def test_the_stream_before_a_layer_is_that_after_the_one_before():
    assert place("blocks.3.hook_resid_pre")["layer"] == 2
    assert place("blocks.3.hook_resid_pre")["hook"] == "resid_post"
    assert place("blocks.0.hook_resid_pre") == {
        "layer": 0, "hook": "resid_pre", "hook_name": "blocks.0.hook_resid_pre"
    }  # fmt: skip
    onward = place("blocks.3.hook_resid_pre", "blocks.3.hook_mlp_out", "m")
    assert (onward["layer"], onward["hook"], onward["hook_out"]) == (3, "resid_pre", "mlp_out")
    assert onward["model_name"] == "m"


def test_a_transcoder_stays_in_its_layer():
    with pytest.raises(SAEError, match="Cross-layer"):
        place("blocks.3.mlp.hook_in", "blocks.4.hook_mlp_out")
    with pytest.raises(SAEError, match="normalised"):
        place("blocks.3.ln2.hook_normalized")


def test_the_models_norm_is_known_for_models_that_divide_by_the_root_mean_square():
    name = "blocks.3.ln2.hook_normalized"
    scaling = input_scaling(name, GEMMA)
    x = torch.randn(5, 8)
    norm = torch.nn.RMSNorm(8, eps=1e-6)
    torch.testing.assert_close(scaling(x).x, norm(x).detach())
    assert input_scaling("blocks.3.mlp.hook_in", GEMMA) is None
    for model in ("gpt2", ""):
        with pytest.raises(SAEError, match="root mean square"):
            input_scaling(name, model)


def test_hooks_without_a_word_are_the_stream_after_the_layer():
    sae = make_sae("relu")
    assert (sae.hook, sae.hook_out, sae.transcodes) == ("resid_post", "resid_post", False)
