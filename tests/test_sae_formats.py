"""Every format SAEs are published in, from files of the documented layout, against the formula of its family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch import Tensor

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.sae.reference import Reference

D, F, K = 6, 20, 4
Weights = dict[str, Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


W = {
    "W_enc": numbers(D, F), "W_dec": numbers(F, D, seed=1), "b_enc": numbers(F), "b_dec": numbers(D),
    "threshold": numbers(F, seed=2).abs(),
}  # fmt: skip
LINEAR = {"encoder.weight": W["W_enc"].T, "encoder.bias": W["b_enc"], "decoder.weight": W["W_dec"].T}
H = 2 * numbers(50, D, seed=5)
CLOSE = {"rtol": 1e-4, "atol": 1e-3}
"""What float32 sums in another order may differ by, for values up to some tens, with much to spare."""


def top(pre: Tensor) -> Tensor:
    """The K largest of each row, through a ReLU, the slow way."""
    out = torch.zeros_like(pre)
    for row, values in enumerate(pre):
        for i in sorted(range(F), key=lambda i: -float(values[i]))[:K]:
            out[row, i] = max(0.0, float(values[i]))
    return out


def jump(pre: Tensor, threshold: Tensor) -> Tensor:
    return pre.relu() * (pre > threshold)


def write(path: Path, weights: Weights, config: Any = None, name: str = "config.json") -> Path:
    """Weights in the file type its name says, and a configuration beside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {key: tensor.contiguous() for key, tensor in weights.items()}
    if path.suffix == ".npz":
        np.savez(path, **{key: tensor.numpy() for key, tensor in whole.items()})
    elif path.suffix == ".safetensors":
        save_file(whole, path)
    else:
        torch.save(whole, path)
    if config is not None:
        (path.parent / name).write_text(json.dumps(config))
    return path


def agrees(source: Path, a: Tensor, *, layer: int | None = None, h_hat: Tensor | None = None) -> SparseAutoencoder:
    sae = SparseAutoencoder.load(source)
    torch.testing.assert_close(sae.encode(H), a, **CLOSE)
    expected = a @ W["W_dec"] + W["b_dec"] if h_hat is None else h_hat
    torch.testing.assert_close(sae.reconstruct(H), expected, **CLOSE)
    assert sae.layer == layer
    return sae


@pytest.mark.parametrize("case", [str, str.lower])
def test_gemma_scope(tmp_path, case):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_142"
    path = write(folder / "params.npz", {case(name): tensor for name, tensor in W.items()})
    a = jump(H @ W["W_enc"] + W["b_enc"], W["threshold"])
    for source in (folder, path):
        sae = agrees(source, a, layer=3)
        assert (sae.metadata["hook"], sae.metadata["model_name"]) == ("resid_post", "google/gemma-2-2b")
    blob = path.rename(tmp_path / "0123abcd")
    path.symlink_to(blob)
    assert agrees(path, a, layer=3).metadata["model_name"] == "google/gemma-2-2b"
    other = write(tmp_path / "gemma-scope-9b-it-mlp" / "layer_20" / "params.npz", W)
    assert SparseAutoencoder.load(other).metadata["hook"] == "mlp_out"
    with pytest.raises(SAEError, match="embedding"):
        SparseAutoencoder.load(write(tmp_path / "embedding" / "width_4k" / "params.npz", W))


@pytest.mark.parametrize("described", [True, False])
def test_gemma_scope_2(tmp_path, described):
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.12.output"} if described else None
    stored = {"w_enc": W["W_enc"], "w_dec": W["W_dec"]} | {n: W[n] for n in ("b_enc", "b_dec", "threshold")}
    a = jump(H @ W["W_enc"] + W["b_enc"], W["threshold"])
    folder = tmp_path / "resid_post" / "layer_12_width_16k_l0_small"
    write(folder / "params.safetensors", stored, config)
    assert agrees(folder, a, layer=12).metadata["hook"] == "resid_post"
    affine = tmp_path / "resid_post" / "layer_12_width_16k_l0_small_affine"
    skip = numbers(D, D)
    write(affine / "params.safetensors", stored | {"affine_skip_connection": skip}, config)
    agrees(affine, a, layer=12, h_hat=a @ W["W_dec"] + W["b_dec"] + H @ skip)
    write(tmp_path / "transcoder" / "layer_1_width_16k" / "params.safetensors", stored)
    found = SparseAutoencoder.load(tmp_path / "transcoder" / "layer_1_width_16k")
    assert (found.layer, found.hook, found.hook_out) == (1, "mlp_in", "mlp_out")


def test_a_transcoder_of_another_width(tmp_path):
    """Its decoder, bias and linear path are of the width at its output."""
    W_dec, b_dec, skip = numbers(F, 4), numbers(4), numbers(D, 4)
    stored = {"w_enc": W["W_enc"], "w_dec": W_dec, "b_enc": W["b_enc"], "b_dec": b_dec, "threshold": W["threshold"]}
    config = {
        "hf_hook_point_in": "model.language_model.layers.7.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.language_model.layers.7.post_feedforward_layernorm.output",
    }  # fmt: skip
    write(tmp_path / "params.safetensors", stored | {"affine_skip_connection": skip}, config)
    a = jump(H @ W["W_enc"] + W["b_enc"], W["threshold"])
    sae = agrees(tmp_path, a, layer=7, h_hat=a @ W_dec + b_dec + H @ skip)
    assert (sae.d_model, sae.d_out, sae.hook, sae.hook_out) == (D, 4, "mlp_in", "mlp_out")
    assert sae.reconstruct(H.reshape(5, 10, D)).shape == (5, 10, 4)
    config["hf_hook_point_out"] = "model.layers.7.output"
    write(tmp_path / "params.safetensors", stored | {"affine_skip_connection": skip.T}, config)
    with pytest.raises(SAEError, match="W_skip"):
        SparseAutoencoder.load(tmp_path)
    write(tmp_path / "params.safetensors", stored, {"hf_hook_point_in": "model.layers.7.output"})
    with pytest.raises(SAEError, match="W_dec"):
        SparseAutoencoder.load(tmp_path)


def test_cross_layer_transcoders_are_refused_with_the_reason(tmp_path):
    stored = {"w_enc": W["W_enc"], "w_dec": numbers(F, 3, D), "b_enc": W["b_enc"], "b_dec": numbers(3, D)}
    path = write(tmp_path / "clt" / "layer_1.safetensors", stored | {"threshold": W["threshold"]})
    with pytest.raises(SAEError, match="writes to 3 layers"):
        SparseAutoencoder.load(path)


def test_gemma_scope_transcoders_read_behind_the_models_norm(tmp_path):
    folder = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_76"
    write(folder / "params.npz", W)
    x = H / (H.pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt()
    sae = agrees(folder, jump(x @ W["W_enc"] + W["b_enc"], W["threshold"]), layer=3)
    assert (sae.hook, sae.hook_out, sae.metadata["model_name"]) == ("resid_mid", "mlp_out", "google/gemma-2-2b")


def test_circuit_tracer_transcoders(tmp_path):
    stored = {"W_enc": W["W_enc"].T, "W_dec": W["W_dec"], "b_enc": W["b_enc"], "b_dec": W["b_dec"]}
    path = write(tmp_path / "qwen3-1.7b-transcoders-lowl0" / "layer_12.safetensors", stored)
    sae = agrees(path, PLAIN.relu(), layer=12)
    assert (sae.hook, sae.hook_out, sae.metadata["model_name"]) == ("mlp_in", "mlp_out", "Qwen/Qwen3-1.7B")


def test_sparsify(tmp_path):
    config = {"activation": "topk", "expansion_factor": 4, "num_latents": 0, "k": K, "d_in": D, "transcode": False}
    stored = {"W_dec": W["W_dec"], "b_dec": W["b_dec"], **{n: LINEAR[n] for n in ("encoder.weight", "encoder.bias")}}
    write(tmp_path / "layers.10" / "sae.safetensors", stored, config, "cfg.json")
    a = top((H - W["b_dec"]) @ W["W_enc"] + W["b_enc"])
    assert agrees(tmp_path / "layers.10", a, layer=10).metadata["hook"] == "resid_post"
    write(tmp_path / "h.5.mlp" / "sae.safetensors", stored, config, "cfg.json")
    assert agrees(tmp_path / "h.5.mlp", a, layer=5).metadata["hook"] == "mlp_out"
    for change in ({"activation": "groupmax"}, {"signed": True}, {"k": None}):
        write(tmp_path / "layers.1" / "sae.safetensors", stored, config | change, "cfg.json")
        with pytest.raises(SAEError, match="expected"):
            SparseAutoencoder.load(tmp_path / "layers.1")


def test_a_sparsify_transcoder_reads_its_input_as_it_is(tmp_path):
    config = {"activation": "topk", "k": K, "d_in": D, "transcode": True, "skip_connection": True}
    skip = numbers(D, D, seed=9)
    stored = {"W_dec": W["W_dec"], "b_dec": W["b_dec"], **{n: LINEAR[n] for n in ("encoder.weight", "encoder.bias")}}
    write(tmp_path / "layers.10.mlp" / "sae.safetensors", stored | {"W_skip": skip}, config, "cfg.json")
    a = top(PLAIN)
    sae = agrees(tmp_path / "layers.10.mlp", a, layer=10, h_hat=a @ W["W_dec"] + W["b_dec"] + H @ skip.T)
    assert (sae.hook, sae.hook_out) == ("mlp_in", "mlp_out")
    write(tmp_path / "embed_tokens" / "sae.safetensors", stored, config, "cfg.json")
    with pytest.raises(SAEError, match="hook point"):
        SparseAutoencoder.load(tmp_path / "embed_tokens")


def gated(h: Tensor) -> Tensor:
    x = (h - W["b_dec"]) @ W["W_enc"]
    return (x + W["threshold"] > 0) * (x * W["b_enc"].exp() + W["b_enc"]).relu()


CENTRED = (H - W["b_dec"]) @ W["W_enc"] + W["b_enc"]
PLAIN = H @ W["W_enc"] + W["b_enc"]
BAR = torch.tensor(0.75)
TOPK = {**LINEAR, "b_dec": W["b_dec"], "k": torch.tensor(K), "threshold": BAR}
CLASSES: dict[str, tuple[Weights, Callable[[], Tensor]]] = {
    "AutoEncoder": ({**LINEAR, "bias": W["b_dec"]}, lambda: CENTRED.relu()),
    "AutoEncoderNew": ({**LINEAR, "decoder.bias": W["b_dec"]}, lambda: PLAIN.relu()),
    "GatedAutoEncoder": (
        {"encoder.weight": W["W_enc"].T, "decoder.weight": W["W_dec"].T, "decoder_bias": W["b_dec"],
         "r_mag": W["b_enc"], "gate_bias": W["threshold"], "mag_bias": W["b_enc"]},
        lambda: gated(H),
    ),
    "JumpReluAutoEncoder": (W, lambda: jump(PLAIN, W["threshold"])),
    "AutoEncoderTopK": (TOPK, lambda: top(CENTRED)),
    "BatchTopKSAE": (TOPK, lambda: jump(CENTRED, BAR)),
    "MatryoshkaBatchTopKSAE": ({**W, "threshold": BAR}, lambda: jump(CENTRED, BAR)),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary_learning(tmp_path, name):
    stored, expected = CLASSES[name]
    trainer = {"dict_class": name, "layer": 4, "lm_name": "tiny", "submodule_name": "resid_post_layer_4"}
    write(tmp_path / "ae.pt", stored, {"trainer": trainer, "buffer": {}})
    sae = agrees(tmp_path, expected(), layer=4)
    assert (sae.metadata["hook"], sae.metadata["model_name"]) == ("resid_post", "tiny")


def test_llama_scope(tmp_path):
    folder = tmp_path / "Llama3_1-8B-Base-L7R-8x"
    path = write(folder / "checkpoints" / "final.safetensors", {**LINEAR, "decoder.bias": W["b_dec"]})
    config = {
        "d_model": D, "d_sae": F, "hook_point_in": "blocks.7.hook_resid_post", "jump_relu_threshold": 0.4,
        "dataset_average_activation_norm": {"in": 8.0, "out": 8.0},
    }  # fmt: skip
    (folder / "hyperparams.json").write_text(json.dumps(config))
    s, out = D**0.5 / 8.0, D**0.5 / 2.0
    a = jump((H * s) @ W["W_enc"] + W["b_enc"], torch.tensor(0.4 * s))
    agrees(folder, a / s, layer=7, h_hat=(a @ W["W_dec"] + W["b_dec"]) / s)
    agrees(path, a / s, layer=7, h_hat=(a @ W["W_dec"] + W["b_dec"]) / s)
    config |= {"hook_point_out": "blocks.7.hook_mlp_out", "hook_point_in": "blocks.7.ln2.hook_normalized"}
    config["dataset_average_activation_norm"] = {"in": 8.0, "out": 2.0}
    (folder / "hyperparams.json").write_text(json.dumps(config))
    x = H / (H.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt()
    a = jump((x * s) @ W["W_enc"] + W["b_enc"], torch.tensor(0.4 * s))
    sae = agrees(folder, a / s, layer=7, h_hat=(a @ W["W_dec"] + W["b_dec"]) / out)
    assert (sae.hook, sae.hook_out) == ("resid_mid", "mlp_out")
    del config["dataset_average_activation_norm"]
    (folder / "hyperparams.json").write_text(json.dumps(config))
    with pytest.raises(SAEError, match="scaled by"):
        SparseAutoencoder.load(folder)


NORM = "dataset_average_activation_norm.blocks.7.hook_resid_post"
OPENMOSS = {
    "hook_point_in": "blocks.7.hook_resid_post", "hook_point_out": "blocks.7.hook_resid_post", "act_fn": "jumprelu",
    "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "d_model": D, "sae_type": "sae",
}  # fmt: skip
R1 = {**LINEAR, "decoder.bias": W["b_dec"], "log_jumprelu_threshold": W["threshold"].log(), NORM: torch.tensor(8.0)}
V2 = {"W_E": W["W_enc"], "b_E": W["b_enc"], "W_D": W["W_dec"], "b_D": W["b_dec"], NORM: torch.tensor(8.0),
      "activation_function.log_jumprelu_threshold": W["threshold"].log()}  # fmt: skip


@pytest.mark.parametrize("stored", [R1, V2], ids=["R1-distill", "llamascopium"])
@pytest.mark.parametrize("norms", [True, False])
def test_openmoss_jumprelu(tmp_path, stored, norms):
    s, n = D**0.5 / 8.0, W["W_dec"].norm(dim=1) if norms else torch.ones(F)
    pre = (H * s) @ W["W_enc"] + W["b_enc"]
    a = jump(pre * n, W["threshold"]) / n
    folder = tmp_path / "Llama-Scope-R1-Distill" / "L7R"
    write(folder / "sae_weights.safetensors", stored, OPENMOSS | {"sparsity_include_decoder_norm": norms})
    sae = agrees(folder, a / s, layer=7, h_hat=(a @ W["W_dec"] + W["b_dec"]) / s)
    assert (sae.hook, sae.metadata["model_name"]) == ("resid_post", "meta-llama/Llama-3.1-8B")


def test_openmoss_topk_ranks_by_decoder_norm(tmp_path):
    """Features of TopK come out in units of the decoder rows' norms."""
    s, n = D**0.5 / 8.0, W["W_dec"].norm(dim=1)
    a = top(((H * s) @ W["W_enc"] + W["b_enc"]) * n)
    write(tmp_path / "sae_weights.safetensors", V2, OPENMOSS | {"act_fn": "topk", "top_k": K})
    agrees(tmp_path, a / s, layer=7, h_hat=((a / n) @ W["W_dec"] + W["b_dec"]) / s)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_glu_encoder": True}, "gated linear unit"), ({"sae_type": "crosscoder"}, "several layers"),
        ({"sae_type": "clt"}, "several layers"), ({"norm_activation": "batch-wise"}, "depends on the batch"),
        ({"act_fn": "layertopk"}, "act_fn"), ({"act_fn": "topk", "top_k": None}, "top_k"),
        ({"hook_point_in": "blocks.8.hook_resid_post", "hook_point_out": "blocks.8.hook_resid_post"}, "no such tensor"),
        ({"hook_point_in": None}, "hook point"),
    ],
)  # fmt: skip
def test_openmoss_that_cannot_be_read(tmp_path, change, said):
    write(tmp_path / "sae_weights.safetensors", V2, OPENMOSS | change)
    with pytest.raises(SAEError, match=said):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.parametrize("name", ["sae_weights.pt", "sae_weights.dcp"])
def test_a_training_checkpoint_of_openmoss_says_how_to_convert_it(tmp_path, name):
    torch.save({"sae": V2}, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps(OPENMOSS))
    with pytest.raises(SAEError, match="save_pretrained"):
        SparseAutoencoder.load(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_goodfire(tmp_path, suffix):
    stored = {
        "encoder_linear.weight": W["W_enc"].T, "encoder_linear.bias": W["b_enc"],
        "decoder_linear.weight": W["W_dec"].T, "decoder_linear.bias": W["b_dec"],
    }  # fmt: skip
    path = write(tmp_path / f"Llama-3.1-8B-Instruct-SAE-l19{suffix}", stored)
    for source in (tmp_path, path):
        assert agrees(source, PLAIN.relu(), layer=19).metadata["model_name"] == "meta-llama/Llama-3.1-8B-Instruct"


def test_qwen_scope(tmp_path):
    folder = tmp_path / f"SAE-Res-Qwen3-8B-Base-W64K-L0_{K}"
    stored = {"W_enc": W["W_enc"].T, "W_dec": W["W_dec"].T, "b_enc": W["b_enc"], "b_dec": W["b_dec"]}
    path = write(folder / "layer10.sae.pt", stored)
    assert agrees(folder, top(PLAIN), layer=10).metadata["model_name"] == "Qwen/Qwen3-8B-Base"
    write(folder / "layer11.sae.pt", stored)
    with pytest.raises(SAEError, match="holds 2 SAEs"):
        SparseAutoencoder.load(folder)
    agrees(path, top(PLAIN), layer=10)
    with pytest.raises(SAEError, match="where k is to be found"):
        SparseAutoencoder.load(write(tmp_path / "mine" / "layer1.sae.pt", stored))


FILES = {
    "params.npz": (W, None), "params.safetensors": ({n.replace("W_", "w_"): t for n, t in W.items()}, None),
    "ae.pt": (W, {"trainer": {"dict_class": "JumpReluAutoEncoder"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_bad_files_are_named_errors(tmp_path, name):
    weights, config = FILES[name]
    path = write(tmp_path / name, weights, config)
    assert SparseAutoencoder.load(tmp_path).d_sae == F
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(SAEError, match="cannot read"):
            SparseAutoencoder.load(tmp_path)
    first = next(key for key in weights if key.lower() == "w_enc")
    bad = {
        "lacks": {key: tensor for key, tensor in weights.items() if key != first},
        "type of": weights | {first: weights[first].to(torch.int8)},
        "NaN": weights | {first: weights[first].clone().index_fill_(0, torch.tensor([1]), torch.nan)},
        "b_enc": weights | {"b_enc": weights["b_enc"][:-1]},
    }
    for message, stored in bad.items():
        write(path, stored)
        with pytest.raises(SAEError, match=message):
            SparseAutoencoder.load(tmp_path)


def test_fp8_is_refused(tmp_path):
    weights, _ = FILES["params.safetensors"]
    write(tmp_path / "params.safetensors", weights | {"w_enc": weights["w_enc"].to(torch.float8_e4m3fn)})
    with pytest.raises(SAEError, match="float8_e4m3fn"):
        SparseAutoencoder.load(tmp_path)


class Payload:
    """What a hostile file would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


def test_no_code_in_a_torch_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"W_enc": Payload()}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "JumpReluAutoEncoder"}}))
    with pytest.raises(SAEError, match="cannot read"):
        SparseAutoencoder.load(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("text", "repo", "path", "revision"),
    [
        ("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142", "google/gemma-scope-2b-pt-res",
         "layer_3/width_16k/average_l0_142", None),
        ("google/gemma-scope-2-1b-it@abc:resid_post/x", "google/gemma-scope-2-1b-it", "resid_post/x", "abc"),
        ("llama_scope_lxr_8x:l3r_8x", "fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L3R-8x", None),
        ("SAE-Res-Qwen3-W64K-L0_50:layer3.sae.pt", "Qwen/SAE-Res-Qwen3-W64K-L0_50", "layer3.sae.pt", None),
        ("EleutherAI/sae-llama-3-8b-32x:layers.10", "EleutherAI/sae-llama-3-8b-32x", "layers.10", None),
        ("me/mine", "me/mine", "", None),
    ],
)  # fmt: skip
def test_references_as_people_write_them(text, repo, path, revision):
    assert Reference.parse(text) == Reference(repo, path, revision)


SETTINGS = {"layers.1/cfg.json", "layers.10/cfg.json", "deep/config.json", "v5_layer_0.pt/cfg.json"}


@pytest.mark.parametrize(
    ("text", "fetched"),
    [
        ("o/r:layers.10", {"layers.10/cfg.json", "layers.10/sae.safetensors"}),
        ("o/r:layers.1", {"layers.1/cfg.json", "layers.1/sae.safetensors"}),
        ("o/r:deep/ae.pt", {"deep/ae.pt", "deep/config.json"}),
        ("o/r:v5_layer_0.pt", SETTINGS),
        ("o/r:layer1.sae.pt", {"layer1.sae.pt", *SETTINGS}),
        ("o/r", {"README.md"}),
    ],
)
def test_only_what_is_named_is_fetched(text, fetched):
    files = [
        "layers.1/cfg.json",
        "layers.1/sae.safetensors",
        "layers.10/cfg.json",
        "layers.10/sae.safetensors",
        "deep/ae.pt",
        "deep/config.json",
        "deep/other.pt",
        "README.md",
        "layer1.sae.pt",
        "layer2.sae.pt",
        "v5_layer_0.pt/cfg.json",
    ]
    assert set(filter_repo_objects(files, **Reference.parse(text).patterns())) == fetched


def test_from_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--google--gemma-scope-2b-pt-res"
    snapshot = repo / "snapshots" / ("0" * 40)
    write(snapshot / "layer_3" / "width_16k" / "average_l0_142" / "params.npz", W)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    sae = SparseAutoencoder.load("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142")
    assert (sae.layer, sae.d_sae, sae.source) == (3, F, "gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_142")
    with pytest.raises(SAEError, match="has no layer_9"):
        SparseAutoencoder.load("gemma-scope-2b-pt-res/layer_9/width_16k/average_l0_142")
    with pytest.raises(SAEError, match="cannot fetch nobody/nothing"):
        SparseAutoencoder.load("nobody/nothing:x")
