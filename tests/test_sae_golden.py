"""Each family's own library writes an SAE and encodes; what we read must give the same features.

The libraries are heavy, so each test runs where its library is installed: `make golden` makes an environment of them.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder, TopK
from saeguard.sae.slim import slim

D, F, K, D_OUT = 16, 64, 5, 12
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
FEATURES = [3, 17, 40, 41, 63]


def library(name: str) -> ModuleType:
    """The library, whose import may warn of what is none of our business."""
    pytest.importorskip(name.partition(".")[0])
    return importlib.import_module(name)


pytestmark = pytest.mark.filterwarnings("default")


def stream() -> Tensor:
    return 3 * torch.randn(40, D, generator=torch.Generator().manual_seed(1)) + 0.5


def randomise(module: torch.nn.Module) -> None:
    """Biases are 0 in a fresh SAE, and would hide what is done with them; so would thresholds."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "threshold" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))


def agrees(ours: SparseAutoencoder, a: Tensor, h_hat: Tensor, *, unit: Tensor | float = 1.0) -> None:
    """Their features times the unit that ours are in, their reconstruction, and the slim form of some features."""
    a, h = (a.to_dense() if a.is_sparse else a) * unit, stream()
    assert 0.01 < float((a > 0).float().mean()) < 0.9, "a test of nothing"
    torch.testing.assert_close(ours.encode(h), a, **CLOSE)
    torch.testing.assert_close(ours.reconstruct(h), h_hat, **CLOSE)
    torch.testing.assert_close(slim(ours, FEATURES)(h), a[:, FEATURES], **CLOSE)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify(tmp_path: Path, transcode: bool, skip: bool) -> None:
    sparsify = library("sparsify")
    config = sparsify.SparseCoderConfig(expansion_factor=4, k=K, transcode=transcode, skip_connection=skip)
    theirs = sparsify.SparseCoder(D, config)
    randomise(theirs)
    folder = tmp_path / "layers.3.mlp"
    theirs.save_to_disk(folder)
    encoded = theirs.encode(stream())
    a = torch.zeros(40, F).scatter(1, encoded.top_indices, encoded.top_acts)
    h_hat = theirs.decode(encoded.top_acts, encoded.top_indices)
    if skip:
        h_hat = h_hat + stream() @ theirs.W_skip.mT
    ours = SparseAutoencoder.load(folder)
    agrees(ours, a.detach(), h_hat.detach())
    assert (ours.layer, ours.hook, ours.hook_out) == (3, "mlp_in" if transcode else "mlp_out", "mlp_out")


DICTIONARIES = {
    "AutoEncoder": "dictionary", "AutoEncoderNew": "dictionary", "GatedAutoEncoder": "dictionary",
    "JumpReluAutoEncoder": "dictionary", "AutoEncoderTopK": "trainers.top_k", "BatchTopKSAE": "trainers.batch_top_k",
    "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k",
}  # fmt: skip


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning(tmp_path: Path, name: str) -> None:
    cls = getattr(library(f"dictionary_learning.{DICTIONARIES[name]}"), name)
    sizes: dict[str, tuple[Any, ...]] = {
        "AutoEncoderTopK": (K,), "BatchTopKSAE": (K,), "MatryoshkaBatchTopKSAE": (K, [F // 4, 3 * F // 4])
    }  # fmt: skip
    theirs = cls(D, F, *sizes.get(name, ()))
    randomise(theirs)
    if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        theirs.threshold.fill_(0.7)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "layer": 4, "lm_name": "tiny", "submodule_name": "resid_post_layer_4"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    with torch.no_grad():
        a = theirs.encode(stream())
        ours = SparseAutoencoder.load(tmp_path)
        agrees(ours, a, theirs.decode(a))
    assert (ours.layer, ours.hook) == (4, "resid_post")


SAE_LENS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("StandardSAE", {}),
    "without b_dec at the input": ("StandardSAE", {"apply_b_dec_to_input": False}),
    "jumprelu": ("JumpReLUSAE", {}),
    "topk": ("TopKSAE", {"k": K}),
    "topk in decoder norms": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "gated": ("GatedSAE", {}),
    "gated, b_dec not at the input": ("GatedSAE", {"apply_b_dec_to_input": False}),
    "layer norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "layer norm, jumprelu": ("JumpReLUSAE", {"normalize_activations": "layer_norm"}),
    "layer norm, topk": ("TopKSAE", {"normalize_activations": "layer_norm", "k": K}),
    "norm rescaled": ("StandardSAE", {"normalize_activations": "constant_norm_rescale"}),
    "norm rescaled, gated": ("GatedSAE", {"normalize_activations": "constant_norm_rescale"}),
    "transcoder": ("Transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "skip transcoder": ("SkipTranscoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "jumprelu transcoder": ("JumpReLUTranscoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "jumprelu skip transcoder": ("JumpReLUSkipTranscoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
}


def sae_lens(name: str, **settings: Any) -> Any:
    saes = library("sae_lens.saes")
    theirs = getattr(saes, name)(getattr(saes, f"{name}Config")(d_in=D, d_sae=F, **settings))
    randomise(theirs)
    transcodes = "Transcoder" in name
    theirs.cfg.metadata.hook_name = "blocks.2.mlp.hook_in" if transcodes else "blocks.2.hook_resid_post"
    theirs.cfg.metadata.model_name = "tiny"
    if transcodes:
        theirs.cfg.metadata.hook_name_out = "blocks.2.hook_mlp_out"
    return theirs


def unit(theirs: Any) -> Tensor | float:
    """What SAELens divides the input by, and does not give back to its features."""
    h = stream()
    if theirs.cfg.normalize_activations == "layer_norm":
        return h.std(dim=-1, keepdim=True)
    rescaled = theirs.cfg.normalize_activations == "constant_norm_rescale"
    return h.norm(dim=-1, keepdim=True) / D**0.5 if rescaled else 1.0


@torch.no_grad()
@pytest.mark.parametrize("case", SAE_LENS)
def test_sae_lens(tmp_path: Path, case: str) -> None:
    name, settings = SAE_LENS[case]
    theirs = sae_lens(name, **settings)
    theirs.save_model(tmp_path)
    ours = SparseAutoencoder.load(tmp_path)
    agrees(ours, theirs.encode(stream()), theirs(stream()), unit=unit(theirs))
    assert ours.layer == 2
    assert (ours.hook, ours.hook_out) == (("mlp_in", "mlp_out") if "Transcoder" in name else ("resid_post",) * 2)


@torch.no_grad()
@pytest.mark.parametrize("saved", ["for inference", "in training"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_sae_lens_batch_topk(tmp_path: Path, name: str, rescale: bool, saved: str) -> None:
    saes = library("sae_lens.saes")
    widths = {"matryoshka_widths": [F // 4, F]} if name == "MatryoshkaBatchTopK" else {}
    settings = {"d_in": D, "d_sae": F, "k": K, "rescale_acts_by_decoder_norm": rescale, **widths}
    theirs = getattr(saes, f"{name}TrainingSAE")(getattr(saes, f"{name}TrainingSAEConfig")(**settings))
    randomise(theirs)
    theirs.topk_threshold.fill_(0.6)
    theirs.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    theirs.save_inference_model(tmp_path / "inference")
    theirs.save_model(tmp_path / "training")
    reference = saes.SAE.load_from_disk(tmp_path / "inference")
    ours = SparseAutoencoder.load(tmp_path / ("inference" if saved == "for inference" else "training"))
    assert isinstance(ours.activation, JumpReLU)
    agrees(ours, reference.encode(stream()), reference(stream()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["StandardSAE", "JumpReLUSAE", "GatedSAE", "TopKSAE"])
def test_sae_lens_folds_the_same_factor(tmp_path: Path, name: str) -> None:
    """Their fold leaves features in units of the scaled input, ours are in units of the input."""
    theirs = sae_lens(name, normalize_activations="expected_average_only_in", **({"k": K} if name == "TopKSAE" else {}))
    theirs.cfg.metadata.norm_scaling_factor = 0.5
    theirs.save_model(tmp_path)
    theirs.fold_activation_norm_scaling_factor(0.5)
    ours = SparseAutoencoder.load(tmp_path)
    agrees(ours, theirs.encode(stream()), theirs(stream()), unit=2.0)


OPENMOSS: dict[str, dict[str, Any]] = {
    f"{act_fn}, {norm}{', decoder norms' if norms else ''}": {
        "act_fn": act_fn, "norm_activation": norm, "sparsity_include_decoder_norm": norms,
    }
    for act_fn in ("relu", "jumprelu", "topk", "batchtopk")
    for norm in ("dataset-wise", "inference", "token-wise")
    for norms in (False, True)
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", OPENMOSS)
def test_llamascopium(tmp_path: Path, case: str) -> None:
    module = library("llamascopium.models.sae")
    settings = OPENMOSS[case]
    hook = "blocks.2.hook_resid_post"
    config = module.SAEConfig(
        hook_point_in=hook, hook_point_out=hook, d_model=D, expansion_factor=F / D, top_k=K, dtype=torch.float32,
        device="cpu", **settings,
    )  # fmt: skip
    theirs = module.SparseAutoEncoder(config)
    randomise(theirs)
    theirs.set_dataset_average_activation_norm({hook: 9.0})
    theirs.save_pretrained(tmp_path)
    theirs.cfg.save_hyperparameters(tmp_path)
    ours = SparseAutoencoder.load(tmp_path)
    batch, scales = theirs.normalize_activations({hook: stream()}, return_scale_factor=True)
    rows = batch[hook].split(1)  # BatchTopK of one token, as it is served
    a = torch.cat([theirs.encode(row) for row in rows])
    norm = theirs.W_D.norm(dim=1) if isinstance(ours.activation, TopK) and config.sparsity_include_decoder_norm else 1.0
    agrees(ours, a, theirs.decode(a) / scales[hook], unit=norm / scales[hook])
    assert (ours.layer, ours.hook) == (2, "resid_post")
