"""SAEs: the SAELens folder format in its versions, units folded at load, refusals, and fixed thresholds for TopK."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conftest import D_MODEL, D_SAE, make_sae
from reference import FullSAE
from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, ReLU, SparseAutoencoder, TopK
from saeguard.sae.formats.saelens import CONFIG, WEIGHTS, save_saelens
from saeguard.sae.scaling import InputScaling
from saeguard.sae.slim import slim, topk_agreement, topk_thresholds

V6 = {"architecture": "standard", "apply_b_dec_to_input": False, "normalize_activations": "none"}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def weights(**changes: Tensor) -> dict[str, Tensor]:
    """The tensors of a random SAE whose decoder rows are not of unit norm."""
    sae = make_sae("relu")
    rows = sae.W_dec * torch.linspace(0.5, 3.0, D_SAE)[:, None]
    return {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": rows, "b_dec": 10 * sae.b_dec} | changes


def folder(path: Path, config: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    """A folder as SAELens writes it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config))
    save_file(weights() if tensors is None else tensors, path / WEIGHTS)
    return path


def stream(tokens: int, seed: int = 0) -> Tensor:
    return 5 * torch.randn(tokens, D_MODEL, generator=torch.Generator().manual_seed(seed))


def test_round_trip_is_the_same_sae(tmp_path, sae):
    sae = replace(sae, metadata={"model_name": "tiny", "layer": 2})
    save_saelens(sae, tmp_path / "sae", torch.float32)
    found = SparseAutoencoder.load(tmp_path / "sae")
    assert found.fingerprint() == sae.fingerprint()
    assert (found.layer, found.d_model, found.d_sae) == (2, D_MODEL, D_SAE)
    assert found.metadata["model_name"] == "tiny"
    assert found.source == str(tmp_path / "sae")
    h = stream(20)
    assert torch.equal(found.decode(found.encode(h)), sae.decode(sae.encode(h)))


def test_what_was_folded_is_not_folded_again(tmp_path):
    """Settings of the file an SAE was read from do not come along when it is written."""
    config = {
        "apply_b_dec_to_input": True, "architecture": "topk", "k": 9, "rescale_acts_by_decoder_norm": True,
        "normalize_activations": "expected_average_only_in", "norm_scaling_factor": 0.5, "hook_name":
        "blocks.5.hook_resid_pre", "finetuning_scaling_factor": True,
    }  # fmt: skip
    first = SparseAutoencoder.load(folder(tmp_path / "one", config, weights(scaling_factor=torch.full((D_SAE,), 2.0))))
    save_saelens(first, tmp_path / "two", torch.float32)
    again = SparseAutoencoder.load(tmp_path / "two")
    assert again.fingerprint() == first.fingerprint()
    assert (again.layer, again.hook) == (first.layer, first.hook) == (4, "resid_post")


def test_half_precision_round_trip_keeps_biases_and_thresholds_whole(tmp_path):
    sae = make_sae("jumprelu")
    save_saelens(sae, tmp_path / "sae")
    found = SparseAutoencoder.load(tmp_path / "sae")
    assert torch.equal(found.W_dec, sae.W_dec.bfloat16().float())
    assert found.W_dec.dtype == torch.float32
    assert torch.equal(found.b_enc, sae.b_enc)
    assert torch.equal(found.activation.threshold, sae.activation.threshold)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_folded_units_are_the_direct_formula(tmp_path, kind, subtract, rescale):
    threshold = {"threshold": torch.linspace(0.1, 4, D_SAE)} if kind == "jumprelu" else {}
    tensors = weights(**threshold)
    config = V6 | {
        "architecture": {"relu": "standard"}.get(kind, kind), "apply_b_dec_to_input": subtract,
        "rescale_acts_by_decoder_norm": rescale, "k": 9,
    }  # fmt: skip
    found = SparseAutoencoder.load(folder(tmp_path, config, tensors))
    direct = FullSAE(
        *(tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")), kind, **threshold, k=9,
        subtract_b_dec=subtract, decoder_norm_units=rescale and kind == "topk",
    )  # fmt: skip
    h = stream(30)
    torch.testing.assert_close(found.encode(h), direct.encode(h), **CLOSE)
    torch.testing.assert_close(found.decode(found.encode(h)), direct.decode(direct.encode(h)), **CLOSE)


VERSIONS = {
    "v5 standard": ({"activation_fn_str": "relu", "hook_layer": 3, "model_name": "m"}, ReLU, 3),
    "v5 without a word on architecture": ({"apply_b_dec_to_input": True}, ReLU, None),
    "v5 topk": ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}, TopK, None),
    "v5 jumprelu": ({"architecture": "jumprelu", "hook_name": "blocks.5.hook_resid_post"}, JumpReLU, 5),
    "v6 topk": (V6 | {"architecture": "topk", "k": 7, "metadata": {"hook_name": "blocks.2.hook_resid_post"}}, TopK, 2),
    "v6 jumprelu": (V6 | {"architecture": "jumprelu", "metadata": {"hook_name": "model.layers.4"}}, JumpReLU, 4),
    "v6 standard": (V6 | {"metadata": {"model_name": "m", "layer": 0}}, ReLU, 0),
    "gpt2": (V6 | {"metadata": {"hook_name": "transformer.h.11.output"}}, ReLU, 11),
    "the oldest": (
        {
            "hook_point": "blocks.8.hook_resid_pre",
            "hook_point_layer": 8,
            "hook_point_head_index": None,
            "normalize_activations": False,
            "activation_fn": "relu",
            "d_in": D_MODEL,
        },
        ReLU,
        7,
    ),
    "v5 gated": (
        {"architecture": "gated", "activation_fn_str": "relu", "hook_name": "blocks.6.hook_mlp_out"},
        JumpReLU,
        6,
    ),
    "v6 heads": (
        V6 | {"reshape_activations": "hook_z", "metadata": {"hook_name": "blocks.4.attn.hook_z"}},
        ReLU,
        4,
    ),
    "v6 batchtopk in training": (V6 | {"architecture": "batchtopk", "k": 7}, JumpReLU, None),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_configs_of_both_versions(tmp_path, version):
    config, activation, layer = VERSIONS[version]
    gate = {name: torch.ones(D_SAE) for name in ("threshold", "b_gate", "b_mag", "r_mag", "scaling_factor")}
    tensors = weights(**gate, topk_threshold=torch.tensor(1.0))
    found = SparseAutoencoder.load(folder(tmp_path, config, tensors))
    assert type(found.activation) is activation
    assert found.layer == layer
    if isinstance(found.activation, TopK):
        assert found.activation.k == 7


PLACES = {"the oldest": "resid_post", "v5 gated": "mlp_out", "v6 heads": "attn_z"}


@pytest.mark.parametrize("version", PLACES)
def test_the_place_is_said_in_each_version(tmp_path, version):
    gate = {name: torch.ones(D_SAE) for name in ("b_gate", "b_mag", "r_mag")}
    assert SparseAutoencoder.load(folder(tmp_path, VERSIONS[version][0], weights(**gate))).hook == PLACES[version]


def test_a_module_path_is_taken_before_the_name_of_the_hook(tmp_path):
    """What TransformerLens calls the stream before the norm also names the normalised input of Gemma 3's MLP."""
    hooks = {
        "hook_name": "blocks.4.hook_mlp_in", "hook_name_out": "blocks.4.hook_mlp_out", "model_name": "gemma-3-1b",
        "hf_hook_name": "model.layers.4.pre_feedforward_layernorm.output",
        "hf_hook_name_out": "model.layers.4.post_feedforward_layernorm.output",
    }  # fmt: skip
    found = SparseAutoencoder.load(folder(tmp_path, V6 | {"architecture": "transcoder", "metadata": hooks}))
    assert (found.layer, found.hook, found.hook_out) == (4, "mlp_in", "mlp_out")


def test_tuned_factors_of_version_5_multiply_what_is_decoded(tmp_path):
    tensors, factor = weights(), torch.linspace(0.5, 2, D_SAE)
    config = V6 | {"finetuning_scaling_factor": True}
    found = SparseAutoencoder.load(folder(tmp_path, config, tensors | {"scaling_factor": factor}))
    h = stream(20)
    a = (h @ tensors["W_enc"] + tensors["b_enc"]).relu()
    torch.testing.assert_close(found.encode(h), a, **CLOSE)
    torch.testing.assert_close(found.reconstruct(h), (a * factor) @ tensors["W_dec"] + tensors["b_dec"], **CLOSE)


def test_decoder_rows_of_zeros_stay_silent(tmp_path):
    tensors = weights()
    tensors["W_dec"][5] = 0
    config = V6 | {"architecture": "topk", "k": 9, "rescale_acts_by_decoder_norm": True}
    found = SparseAutoencoder.load(folder(tmp_path, config, tensors))
    assert bool(found.reconstruct(stream(20)).isfinite().all())


def test_only_what_saelens_can_hold_is_written_for_it(tmp_path):
    for sae in (
        replace(make_sae("relu"), W_skip=torch.zeros(D_MODEL, D_MODEL)),
        replace(make_sae("relu"), scaling=InputScaling("rms", 1e-6)),
        replace(make_sae("relu"), metadata={"hook": "mlp_in", "hook_out": "mlp_out"}),
    ):
        with pytest.raises(SAEError, match="cannot be written"):
            save_saelens(sae, tmp_path / "sae")


BAD = {
    "another architecture": (V6 | {"architecture": "temporal"}, {}, "depend on the tokens before"),
    "another activation": (V6 | {"activation_fn_str": "tanh-relu"}, {}, "tanh-relu"),
    "gated without its gate": (V6 | {"architecture": "gated"}, {}, "b_gate"),
    "one head": (V6 | {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 3}, {}, "reads head 3 alone"),
    "whitened inputs": (V6 | {"normalize_activations": "covariance_whitening"}, {}, "folded by SAELens"),
    "scaled inputs, as a bool": ({"normalize_activations": True}, {}, "expected_average_only_in"),
    "a place that is none": (V6 | {"metadata": {"hook_name": "hook_embed"}}, {}, "hook_embed"),
    "tuned factors that are not wanted": (V6, {"scaling_factor": torch.full((D_SAE,), 2.0)}, "finetuning_scaling"),
    "a transcoder that scales": (
        V6 | {"architecture": "transcoder", "normalize_activations": "layer_norm"}, {}, "normalize_activations",
    ),
    "a skip transcoder without its path": (V6 | {"architecture": "skip_transcoder"}, {}, "W_skip"),
    "scaled inputs": (V6 | {"normalize_activations": "expected_average_only_in"}, {}, "expected_average_only_in"),
    "jumprelu without thresholds": (V6 | {"architecture": "jumprelu"}, {}, "threshold"),
    "topk without k": (V6 | {"architecture": "topk"}, {}, "usable k"),
    "topk with k = 0": (V6 | {"architecture": "topk", "k": 0}, {}, "usable k"),
    "topk with k past its width": (V6 | {"architecture": "topk", "k": D_SAE + 1}, {}, "k of the SAE"),
    "k that is no number": (V6 | {"architecture": "topk", "k": "32"}, {}, "usable k"),
    "kwargs that are null": (V6 | {"architecture": "topk", "activation_fn_kwargs": None}, {}, "usable k"),
    "config that is no object": ([1, 2], {}, "cfg.json"),
    "metadata that is no object": (V6 | {"metadata": None, "hook_layer": "x"}, {}, "cfg.json"),
}  # fmt: skip
SHAPES = {"W_enc": (D_MODEL, D_SAE, 1), "W_dec": (D_MODEL, D_SAE), "b_enc": (D_SAE + 1,), "b_dec": (D_SAE,)}
for subtract, name in product((True, False), SHAPES):
    config = V6 | {"apply_b_dec_to_input": subtract}
    BAD[f"{name} of another shape, b_dec at the input: {subtract}"] = (config, {name: torch.ones(SHAPES[name])}, name)
BAD["thresholds of another shape"] = (V6 | {"architecture": "jumprelu"}, {"threshold": torch.ones(3)}, "threshold")


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_an_sae_error_that_says_why(tmp_path, case):
    config, changes, said = BAD[case]
    with pytest.raises(SAEError, match=said):
        SparseAutoencoder.load(folder(tmp_path, config, weights(**changes)))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_missing_tensor_is_named(tmp_path, name):
    tensors = {key: tensor for key, tensor in weights().items() if key != name}
    with pytest.raises(SAEError, match=name):
        SparseAutoencoder.load(folder(tmp_path, V6, tensors))


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00garbage" * 9])
def test_damaged_files(tmp_path, file, content):
    (folder(tmp_path, V6) / file).write_bytes(content)
    with pytest.raises(SAEError):
        SparseAutoencoder.load(tmp_path)


def test_a_folder_of_another_kind_and_a_source_that_is_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SAEError, match=r"notes\.txt"):
        SparseAutoencoder.load(tmp_path)
    for source in (tmp_path / "missing", "not-a-hub-id", "/nowhere/at/all"):
        with pytest.raises(SAEError, match="neither a folder, a file nor a hub id"):
            SparseAutoencoder.load(source)


def test_widths_that_do_not_fit_each_other_are_refused_in_memory():
    sae = make_sae("relu")
    with pytest.raises(SAEError, match="b_enc") as caught:
        replace(sae, b_enc=torch.zeros(3))
    assert caught.value.found == (3,)
    assert caught.value.expected == (D_SAE,)


def test_activations_are_their_definitions():
    pre = torch.tensor([[-1.0, 0.0, 0.5, 1.0, 2.0]])
    assert ReLU()(pre).tolist() == [[0, 0, 0.5, 1, 2]]
    assert JumpReLU(torch.tensor([-5.0, -5.0, 0.5, 0.9, 3.0]))(pre).tolist() == [[0, 0, 0, 1, 0]]
    assert TopK(2)(pre).tolist() == [[0, 0, 0, 1, 2]]
    assert TopK(5)(pre).tolist() == [[0, 0, 0.5, 1, 2]]


def test_fingerprint_tells_every_part(sae):
    other = [replace(sae, **{name: getattr(sae, name) + 1e-3}) for name in ("W_enc", "b_enc", "W_dec", "b_dec")] + [
        replace(sae, activation=TopK(9)),
        replace(sae, activation=JumpReLU(torch.full((D_SAE,), 0.25))),
    ]
    assert len({one.fingerprint() for one in [sae, *other]}) == 7
    assert replace(sae, source="elsewhere", metadata={"x": 1}).fingerprint() == sae.fingerprint()


def test_fixed_thresholds_agree_with_topk_as_measured():
    sae, ids = make_sae("topk"), [3, 7, 11, 19]
    fit, held_out = stream(4000), stream(2000, seed=1)
    thresholds = topk_thresholds(sae, ids, fit)
    found = topk_agreement(sae, ids, thresholds, held_out)
    exact = sae.encode(held_out)[:, ids] > 0
    fixed = held_out @ sae.W_enc[:, ids] + sae.b_enc[ids] > thresholds.clamp(min=0)
    assert found.agreement == pytest.approx(int((exact & fixed).sum()) / int((exact | fixed).sum()))
    assert (found.active, found.tokens) == (int((exact | fixed).sum()), 2000)
    assert found.agreement > 0.5
    worse = topk_agreement(sae, ids, thresholds + 3, held_out)
    assert worse.agreement < found.agreement


def test_a_fixed_threshold_makes_the_fewest_errors_on_its_tokens():
    sae, h = make_sae("topk"), stream(300)
    threshold = topk_thresholds(sae, [5], h)
    pre = (h @ sae.W_enc + sae.b_enc)[:, 5]
    member = sae.encode(h)[:, 5] > 0

    def errors(bar: float) -> int:
        return int(((pre > bar) != member).sum())

    assert errors(float(threshold)) == min(errors(float(bar)) for bar in pre)


def test_a_feature_never_in_the_top_k_stays_silent_and_its_slim_form_needs_no_full_encoder():
    sae = make_sae("topk")
    silent = replace(sae, b_enc=torch.where(torch.arange(D_SAE) == 5, -1000.0, sae.b_enc))
    encoder = slim(silent, [5, 6], topk_thresholds=topk_thresholds(silent, [5, 6], stream(200)))
    assert encoder.full_columns is None
    assert encoder.k is None
    found = encoder(stream(200, seed=2))
    assert not bool(found[:, 0].any())
    assert bool(found[:, 1].any())


def test_only_topk_has_fixed_thresholds():
    with pytest.raises(SAEError, match="ReLU"):
        topk_thresholds(make_sae("relu"), [0], stream(5))
