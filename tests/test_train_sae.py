"""Training an SAE: it finds sparse structure, and a killed run goes on as if it had not been killed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import VOCABULARY, make_model, make_tokenizer
from saeguard.corpus import Corpus
from saeguard.errors import CorpusError, SAEError
from saeguard.sae import residuals as residuals_module
from saeguard.sae.autoencoder import ReLU, SparseAutoencoder
from saeguard.sae.formats.saelens import save_saelens
from saeguard.sae.quality import measure
from saeguard.sae.residuals import collect_residuals, training_windows, windows_digest
from saeguard.sae.train import CHECKPOINT_STEPS, SAETraining, train
from saeguard.windows import Window
from topics import passages

D_MODEL, TRUE_FEATURES, ACTIVE = 16, 24, 2
CONFIG = SAETraining(width=48, k=3, token_passes=150 * 512, batch=512, learning_rate=3e-3)
METADATA = {"model_name": "synthetic", "hook_name": "blocks.1.hook_resid_post", "layer": 1}


class Killed(Exception):
    """Stands for a kill: raised in the middle of the work."""


@pytest.fixture(scope="module")
def synthetic() -> Tensor:
    """Rows (tokens, d_model): each the sum of a few of 24 directions, off the origin."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(TRUE_FEATURES, D_MODEL, generator=generator), dim=1)
    picked = torch.rand(8_000, TRUE_FEATURES, generator=generator).topk(ACTIVE, dim=1).indices
    strength = torch.zeros(8_000, TRUE_FEATURES)
    strength.scatter_(1, picked, 1 + torch.rand(8_000, ACTIVE, generator=generator))
    return strength @ directions * 5 + 3


def explained(sae: SparseAutoencoder, rows: Tensor) -> float:
    error = (rows - sae.decode(sae.encode(rows))).square().sum()
    return 1 - float(error / (rows - rows.mean(dim=0)).square().sum())


def test_training_recovers_most_of_sparse_data(synthetic):
    sae = train(synthetic, CONFIG, metadata=METADATA)
    assert explained(sae, synthetic) > 0.85
    assert float((sae.encode(synthetic) > 0).sum(dim=1).float().mean()) == pytest.approx(CONFIG.k, abs=1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(CONFIG.width))


def test_a_trained_sae_survives_its_file(synthetic, tmp_path):
    sae = train(synthetic, CONFIG, metadata=METADATA)
    save_saelens(sae, tmp_path, torch.float32)
    again = SparseAutoencoder.load(tmp_path)
    assert (again.fingerprint(), again.layer) == (sae.fingerprint(), 1)


def test_training_again_gives_the_same_sae(synthetic):
    first, second = (train(synthetic, CONFIG, metadata=METADATA) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()


def test_a_killed_training_goes_on_to_the_same_sae(synthetic, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    kill_at = (CHECKPOINT_STEPS + 20) * CONFIG.batch
    seen: list[int] = []

    def count(tokens: int) -> None:
        seen.append(tokens)
        if sum(seen) >= kill_at:
            raise Killed

    with pytest.raises(Killed):
        train(synthetic, CONFIG, metadata=METADATA, on_step=count, checkpoint=checkpoint)
    assert checkpoint.is_file()
    resumed: list[int] = []
    sae = train(synthetic, CONFIG, metadata=METADATA, on_step=resumed.append, checkpoint=checkpoint)
    assert resumed[0] == CHECKPOINT_STEPS * CONFIG.batch
    assert sum(resumed) == CONFIG.token_passes
    assert not checkpoint.exists()
    assert sae.fingerprint() == train(synthetic, CONFIG, metadata=METADATA).fingerprint()


def test_a_damaged_or_foreign_checkpoint_is_a_named_error(synthetic, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    for content in (b"", b"not a checkpoint", save({"step": torch.tensor(7)})):
        checkpoint.write_bytes(content)
        with pytest.raises(SAEError, match="Delete it to train from the start"):
            train(synthetic, CONFIG, metadata=METADATA, checkpoint=checkpoint)
        assert checkpoint.read_bytes() == content


def test_other_text_or_other_settings_have_other_names():
    first, second = (Window(0, "fit", 48, ids, "") for ids in ((1, 2, 3), (1, 23)))
    names = {windows_digest(windows) for windows in ([first], [second], [first, second], [second, first])}
    assert len(names) == 4
    assert CONFIG.digest() == replace(CONFIG).digest() != replace(CONFIG, seed=1).digest()


def test_a_killed_reading_goes_on_after_its_last_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(residuals_module, "CHUNK", 8)
    model, tokenizer = make_model("llama"), make_tokenizer()
    windows = training_windows(tokenizer, [Corpus.of("text", "retain", passages("kitchen", 80))], 10_000)
    assert len(windows) > 24
    whole = collect_residuals(model, tokenizer, 1, windows, tmp_path / "whole.bin", show=False)
    passes: list[int] = []

    def kill(*_: object) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise Killed

    handle = model.register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        collect_residuals(model, tokenizer, 1, windows, tmp_path / "killed.bin", show=False)
    resumed = collect_residuals(model, tokenizer, 1, windows, tmp_path / "killed.bin", show=False)
    assert torch.equal(resumed, whole)
    in_all = len(passes)
    assert in_all - 3 == -(-len(windows) // 8) - 2, "the two finished chunks are not read again"
    again = collect_residuals(model, tokenizer, 1, windows, tmp_path / "killed.bin", show=False)
    handle.remove()
    assert torch.equal(again, whole)
    assert len(passes) == in_all, "a finished file is not read again"


def test_only_fit_documents_are_trained_on():
    corpus = Corpus.of("text", "retain", passages("kitchen", 40))
    split = {document.index: document.split for document in corpus.documents()}
    windows = training_windows(make_tokenizer(), [corpus], 100_000)
    assert {split[window.document] for window in windows} == {"fit"}


def test_nothing_to_train_on_is_a_named_error(tmp_path):
    with pytest.raises(CorpusError, match="no text"):
        collect_residuals(make_model("llama"), make_tokenizer(), 1, [], tmp_path / "none.bin", show=False)


def test_quality_of_a_perfect_sae_is_perfect():
    """An SAE that rebuilds its input exactly: a feature for each direction and its opposite."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    windows = training_windows(tokenizer, [Corpus.of("text", "retain", passages("garden", 20))], 10_000)
    both = torch.cat([torch.eye(32), -torch.eye(32)])
    sae = SparseAutoencoder(both.T.contiguous(), torch.zeros(64), both, torch.zeros(32), activation=ReLU())
    quality = measure(model, tokenizer, sae, 1, windows)
    assert quality.explained_variance == pytest.approx(1.0, abs=1e-5)
    assert quality.loss_recovered == pytest.approx(1.0, abs=1e-3)
    assert quality.l0 == pytest.approx(32, abs=0.5)
    assert quality.loss_spliced == pytest.approx(quality.loss_clean, abs=1e-4)


def test_one_dominant_dimension_does_not_hide_the_others():
    """An SAE that rebuilds nothing but the one dimension that holds nearly all variance."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    torch.nn.init.normal_(model.model.embed_tokens.weight[:, 7], std=1_000)
    windows = training_windows(tokenizer, [Corpus.of("text", "retain", passages("garden", 20))], 10_000)
    one = torch.stack([torch.eye(32)[7], -torch.eye(32)[7]])
    sae = SparseAutoencoder(one.T.contiguous(), torch.zeros(2), one, torch.zeros(32), activation=ReLU())
    quality = measure(model, tokenizer, sae, 1, windows)
    assert quality.explained_variance > 0.9
    assert quality.explained_variance_median < 0.1


def test_measuring_never_holds_the_logits_of_a_batch_in_float32():
    """A vocabulary of 262,144 would take gigabytes, the loss as much again."""
    model, tokenizer = make_model("llama").bfloat16(), make_tokenizer()
    windows = training_windows(tokenizer, [Corpus.of("text", "retain", passages("garden", 20))], 10_000)
    longest = max(len(window.ids) for window in windows)
    sae = SparseAutoencoder(torch.eye(32), torch.zeros(32), torch.eye(32), torch.zeros(32), activation=ReLU())
    with _LargestFloat32() as seen:
        measure(model, tokenizer, sae, 1, windows)
    assert seen.logits == (longest - 1) * model.config.vocab_size


class _LargestFloat32(TorchDispatchMode):
    """Notes the most values of any float32 tensor over the vocabulary."""

    logits = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32 and VOCABULARY in out.shape and out.dim() > 1:
            self.logits = max(self.logits, out.numel())
        return out
