"""The benchmark of loading: every format it writes is read, in memory near that of the file."""

from __future__ import annotations

import pytest
import torch

from saeguard.bench.load import FORMATS, Random, _load, write_format
from saeguard.sae.autoencoder import SparseAutoencoder

D, F = 64, 512


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_same_random_sae_and_stays_as_it_was_written(tmp_path, name):
    path = write_format(tmp_path, FORMATS[name](Random.of(D, F)))
    before = path.read_bytes()
    sae = SparseAutoencoder.load(path)
    W = Random.of(D, F).plain["W_enc"]
    norms = W.norm(dim=0)
    directions = torch.nn.functional.cosine_similarity(sae.W_enc, W, dim=0)
    assert (sae.d_model, sae.d_sae, sae.layer) == (
        D,
        F,
        19 if name == "Goodfire" else 3,
    )
    assert float(directions.min()) > 0.99
    assert "decoder norms" not in name or torch.allclose(sae.W_enc.norm(dim=0), norms**2, rtol=1e-4)
    assert path.read_bytes() == before


def test_one_load_is_timed_in_a_process_of_its_own(tmp_path):
    path = write_format(tmp_path, FORMATS["SAELens, TopK in decoder norms"](Random.of(512, 8192)))
    run = _load(path)
    assert 0 < run["cpu_seconds"] < 30
    assert 0.9 < run["bytes"] / path.stat().st_size < 1.3
