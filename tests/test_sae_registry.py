"""SAEs by the names of SAELens's registry: a small one anywhere, the real one where SAELens is installed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from conftest import make_sae
from saeguard.errors import SAEError
from saeguard.sae import registry
from saeguard.sae.autoencoder import SparseAutoencoder

REGISTRY = """
res-jb:
  repo_id: o/res
  model: gpt2
  saes:
  - {id: blocks.8.hook_resid_pre, path: blocks.8.hook_resid_pre, norm_scaling_factor: 0.5}
  - {id: blocks.9.hook_resid_pre, path: nine}
rescaled:
  repo_id: o/res
  model: mistral
  config_overrides: {normalize_activations: constant_norm_rescale}
  saes:
  - {id: one, path: nine}
scope-canonical:
  repo_id: google/gemma-scope-2b-pt-mlp
  model: gemma-2-2b
  conversion_func: gemma_2
  saes:
  - {id: layer_3/width_16k/canonical, path: layer_3/width_16k/average_l0_7}
layers:
  repo_id: o/layers
  model: m
  conversion_func: mntss_clt_layer_transcoder
  saes:
  - {id: layer_0, path: 0}
"""
D, F = 32, 64
FLAT = {"hook_point": "blocks.8.hook_resid_pre", "normalize_activations": True, "model_name": "gpt2-small"}
real = pytest.mark.skipif(find_spec("sae_lens") is None, reason="SAELens is not installed")


def weights() -> dict[str, Tensor]:
    sae = make_sae("relu")
    return {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}


def stream() -> Tensor:
    return 5 * torch.randn(30, D, generator=torch.Generator().manual_seed(3))


def cached(hub: Path, repo: str) -> Path:
    """The folder of a repository in a cache of the hub."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(config))
    save_file(tensors or weights(), path / "sae_weights.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def small(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SAELens's registry, with nothing of SAELens but that file."""
    root = tmp_path_factory.mktemp("site")
    (root / "sae_lens").mkdir()
    (root / "sae_lens" / "__init__.py").touch()
    (root / "sae_lens" / "pretrained_saes.yaml").write_text(REGISTRY)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)
    importlib.invalidate_caches()
    registry._releases.cache_clear()
    yield
    registry._releases.cache_clear()


@pytest.mark.parametrize(
    "text",
    ["saelens:res-jb:blocks.8.hook_resid_pre", "res-jb:blocks.8.hook_resid_pre", "res-jb/blocks.8.hook_resid_pre"],
)
def test_the_factor_of_the_registry_is_folded_in(hub, small, text):
    folder(cached(hub, "o/res") / "blocks.8.hook_resid_pre", FLAT)
    sae, h, stored = SparseAutoencoder.load(text), stream(), weights()
    a = ((0.5 * h - stored["b_dec"]) @ stored["W_enc"] + stored["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(h), 2 * a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.reconstruct(h), 2 * (a @ stored["W_dec"] + stored["b_dec"]), rtol=1e-4, atol=1e-4)
    assert (sae.source, sae.layer, sae.hook, sae.metadata["model_name"]) == (text, 7, "resid_post", "gpt2-small")


def test_settings_of_the_registry_stand_before_those_of_the_folder(hub, small):
    folder(cached(hub, "o/res") / "nine", FLAT)
    assert SparseAutoencoder.load("saelens:rescaled:one").scaling.kind == "unit_norm"
    with pytest.raises(SAEError, match="by a factor that its folder does not hold"):
        SparseAutoencoder.load("saelens:res-jb:blocks.9.hook_resid_pre")


def test_a_name_of_the_registry_is_read_by_the_format_of_its_files(hub, small):
    path = cached(hub, "google/gemma-scope-2b-pt-mlp") / "layer_3" / "width_16k" / "average_l0_7"
    path.mkdir(parents=True)
    stored = weights() | {"threshold": torch.ones(F)}
    np.savez(path / "params.npz", **{name: tensor.numpy() for name, tensor in stored.items()})
    sae = SparseAutoencoder.load("scope-canonical:layer_3/width_16k/canonical")
    assert (sae.layer, sae.hook, sae.metadata["model_name"]) == (3, "mlp_out", "google/gemma-2-2b")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("saelens:res-jc:blocks.8.hook_resid_pre", "nearest: res-jb"),
        ("saelens:res-jb:blocks.8.hook_resid_post", "nearest: blocks.8.hook_resid_pre"),
        ("res-jb:blocks.8.hook_resid_post", "nearest: blocks.8.hook_resid_pre"),
        ("saelens:layers:layer_0", "several layers"),
    ],
)
def test_names_that_are_not_there_and_kinds_that_cannot_be_used(small, text, said):
    with pytest.raises(SAEError, match=said):
        SparseAutoencoder.load(text)


def test_names_of_the_hub_are_left_to_it(small):
    for text in ("someone/res-jb:x", "res-jb/not/an/id"):
        with pytest.raises(SAEError, match="cannot fetch"):
            SparseAutoencoder.load(text)


@pytest.mark.skipif(find_spec("sae_lens") is not None, reason="SAELens is installed")
def test_without_saelens_the_error_says_how_to_install_it():
    for text in ("saelens:gpt2-small-res-jb:blocks.8.hook_resid_pre", "gpt2-small-res-jb:blocks.8.hook_resid_pre"):
        with pytest.raises(SAEError, match=r"pip install 'saeguard\[saelens\]'"):
            SparseAutoencoder.load(text)


@real
@pytest.mark.filterwarnings("default")
def test_the_real_registry(hub):
    """SAEs at the places that the real registry names, read by our formats and by SAELens; both give the same."""
    from sae_lens import SAE

    folder(cached(hub, "jbloom/GPT2-Small-SAEs-Reformatted") / "blocks.8.hook_resid_pre", FLAT | {
        "normalize_activations": "none", "d_in": D, "d_sae": F, "dtype": "float32"
    })  # fmt: skip
    ours = SparseAutoencoder.load("gpt2-small-res-jb:blocks.8.hook_resid_pre")
    theirs = SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    torch.testing.assert_close(ours.encode(stream()), theirs.encode(stream()).detach(), rtol=1e-4, atol=1e-4)
    assert (ours.layer, ours.hook) == (7, "resid_post")


@real
@pytest.mark.filterwarnings("default")
def test_a_factor_of_the_real_registry(hub):
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor, get_repo_id_and_folder_name

    release, name = "gpt2-small-mlp-tm", "blocks.0.hook_mlp_out"
    repo, path = get_repo_id_and_folder_name(release, name)
    config = {"hook_name": name, "normalize_activations": "expected_average_only_in", "model_name": "gpt2-small"}
    folder(cached(hub, repo) / path, config | {"d_in": D, "d_sae": F, "dtype": "float32"})
    ours, theirs = SparseAutoencoder.load(f"saelens:{release}:{name}"), SAE.from_pretrained(release, name)
    a = theirs.encode(stream()).detach() / get_norm_scaling_factor(release, name)
    torch.testing.assert_close(ours.encode(stream()), a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.reconstruct(stream()), theirs(stream()).detach(), rtol=1e-4, atol=1e-4)
    assert (ours.layer, ours.hook) == (0, "mlp_out")


@real
@pytest.mark.filterwarnings("default")
def test_a_family_that_saelens_reads_for_us(hub):
    """Attention SAEs of a torch file and a `_cfg.json`, saved by SAELens in its own format, and read."""
    from sae_lens.loading.pretrained_saes_directory import get_repo_id_and_folder_name

    release, name = "gpt2-small-hook-z-kk", "blocks.0.hook_z"
    repo, path = get_repo_id_and_folder_name(release, name)
    file = cached(hub, repo) / path
    file.parent.mkdir(parents=True)
    torch.save(weights(), file)
    config = {"act_size": D, "dict_size": F, "act_name": "blocks.0.attn.hook_z"}
    file.with_name(path.split(".pt")[0] + "_cfg.json").write_text(json.dumps(config))
    ours, h, stored = SparseAutoencoder.load(f"{release}:{name}"), stream(), weights()
    a = ((h - stored["b_dec"]) @ stored["W_enc"] + stored["b_enc"]).relu()
    torch.testing.assert_close(ours.encode(h), a, rtol=1e-4, atol=1e-4)
    assert (ours.layer, ours.hook, ours.source) == (0, "attn_z", f"{release}:{name}")
    with pytest.raises(SAEError, match="SAELens cannot load"):
        SparseAutoencoder.load(f"{release}:blocks.1.hook_z")


@real
def test_every_release_of_the_real_registry_is_found():
    """Each first id of each release resolves, or is refused with its reason."""
    releases = registry._releases(registry._file())
    refused = set()
    for release, entry in releases.items():
        try:
            found = registry.find(f"{release}:{entry['saes'][0]['id']}")
            assert found.reference.repo == entry["repo_id"]
        except SAEError:
            refused.add(entry["conversion_func"])
    assert len(releases) > 100
    assert refused == set(registry.REFUSED)
