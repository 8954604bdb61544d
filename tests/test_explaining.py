"""The pass that keeps the strongest contexts of every feature, against a slow one; its resumption; its rows."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise

import pytest
import torch

from conftest import D_SAE, VOCABULARY, make_sae
from saeguard import shards
from saeguard.corpus import Corpus
from saeguard.errors import CorpusError
from saeguard.explain import explaining
from saeguard.explain.explaining import explanation_rows, read_peaks, whole_word, write_rows
from saeguard.explain.explanations import read_explanations
from saeguard.explain.peaks import NO_TOKEN
from saeguard.model import residual_stream
from saeguard.passages import CONTEXT
from saeguard.shards import Pass
from saeguard.tokens import special_token_ids
from saeguard.windows import Windower
from topics import LAYER, WORDS, corpora

K = 4


@pytest.fixture(scope="module")
def task(llama, tokenizer) -> Pass:
    return Pass(llama, tokenizer, make_sae("jumprelu"), LAYER, Windower(tokenizer, (32,)), sample=K)


@pytest.fixture(scope="module")
def read() -> dict[str, Corpus]:
    forget, retain = corpora()
    return {name: Corpus.of(name, "retain", texts) for name, texts in {"topic": forget, **retain}.items()}


@pytest.fixture(scope="module")
def peaks(task, read, tmp_path_factory):
    return read_peaks(task, read, tmp_path_factory.mktemp("peaks"), k=K)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_CHARACTERS", 800)


def slow(task, read):
    """Every window's (activation, context, corpus) by feature, strongest first; firing counts; token counts."""
    found = [[] for _ in range(D_SAE)]
    fired, tokens = torch.zeros(D_SAE, dtype=torch.int64), torch.zeros(VOCABULARY, dtype=torch.int64)
    special = set(special_token_ids(task.tokenizer))
    for number, name in enumerate(sorted(read)):
        for document in read[name].documents():
            for window in task.windower.cut(document) if document.split == "fit" else ():
                ids = torch.tensor([window.ids])
                a = task.sae.encode(residual_stream(task.model, task.layer, ids, torch.ones_like(ids))[0])
                valid = [t for t in range(1, len(window.ids)) if window.ids[t] not in special]
                for j in range(D_SAE):
                    best = max(valid, key=lambda t: float(a[t, j]))
                    context = [
                        window.ids[t] if 0 <= t < len(window.ids) else NO_TOKEN
                        for t in range(best - CONTEXT, best + CONTEXT + 1)
                    ]
                    found[j].append((float(a[best, j]), context, number))
                    fired[j] += sum(float(a[t, j]) > 0 for t in valid)
                for t in valid:
                    tokens[window.ids[t]] += 1
    return [sorted(its, key=lambda entry: -entry[0]) for its in found], fired, tokens


def test_the_peaks_are_those_of_the_slow_way(task, read, peaks):
    expected, fired, tokens = slow(task, read)
    assert torch.equal(peaks.fired, fired)
    assert torch.equal(peaks.tokens, tokens)
    checked = 0
    for j, its in enumerate(expected):
        active = [entry for entry in its if entry[0] > 0]
        tied = any(a - b < 1e-4 * a for (a, *_), (b, *_) in pairwise(active[: K + 1]))
        its = active[:K]
        assert peaks.activations[j, : len(its)].tolist() == pytest.approx([entry[0] for entry in its], rel=1e-4)
        assert not peaks.activations[j, len(its) :].any()
        if not tied:
            checked += 1
            assert peaks.contexts[j, : len(its)].tolist() == [entry[1] for entry in its]
            assert peaks.corpus[j, : len(its)].tolist() == [entry[2] for entry in its]
    assert checked > D_SAE // 4


def test_memory_does_not_grow_with_the_text(peaks):
    assert peaks.activations.shape == (D_SAE, K)
    assert peaks.contexts.shape == (D_SAE, K, 2 * CONTEXT + 1)


def test_a_stopped_pass_goes_on_and_gives_the_same(task, read, tmp_path, small_chunks, monkeypatch):
    whole = read_peaks(task, read, tmp_path / "whole", k=K)
    reads, original = [], explaining._read

    def stopping(*parts):
        reads.append(parts[2:])
        if len(reads) == 4:
            raise KeyboardInterrupt
        return original(*parts)

    monkeypatch.setattr(explaining, "_read", stopping)
    with pytest.raises(KeyboardInterrupt):
        read_peaks(task, read, tmp_path / "parts", k=K)
    resumed = read_peaks(task, read, tmp_path / "parts", k=K)
    assert reads[3] == reads[4]
    assert len(reads) == len(set(map(str, reads))) + 1
    for name, tensor in vars(whole).items():
        assert torch.equal(tensor, getattr(resumed, name)), name


def test_a_damaged_state_is_read_again(task, read, tmp_path, peaks):
    path = tmp_path / explaining.PEAKS_FILE
    path.write_bytes(b"not a file of tensors")
    again = read_peaks(task, read, tmp_path, k=K)
    assert torch.equal(again.activations, peaks.activations)


def test_a_folder_that_cannot_be_written(task, read, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CorpusError, match="cannot write"):
        read_peaks(task, read, tmp_path / "file", k=K)


def test_the_rows_say_where_a_feature_is_active(task, read, peaks):
    rows = list(explanation_rows(task, peaks, list(read)))
    assert [row["feature"] for row in rows] == peaks.fired.nonzero().flatten().tolist()
    for row in rows:
        assert row["sae"] == task.sae.fingerprint()
        assert 0 < row["firing_rate"] <= 1
        activations = [context["activation"] for context in row["contexts"]]
        assert activations == sorted(activations, reverse=True)
        assert all(context["corpus"] in read for context in row["contexts"])
        assert all(context["token"] for context in row["contexts"])


def test_a_feature_of_one_topic_is_described_by_its_words(task, read, peaks):
    """Of the features whose peaks lie in one corpus, the words are of that corpus's vocabulary."""
    names = sorted(read)
    vocabulary = {name: set(WORDS["forget" if name == "topic" else name]) for name in names}
    checked = 0
    for row in explanation_rows(task, peaks, names):
        places = {context["corpus"] for context in row["contexts"]}
        words = set(row["description"].split(", ")) - {"␣", ""}
        if len(places) == 1 and words:
            checked += 1
            assert words & vocabulary[places.pop()]
    assert checked > 3


@pytest.mark.parametrize(
    ("before", "token", "after", "word"),
    [
        ("the ast", "ronom", "er said", "astronomer"),
        ("the", " Moon", "'s light", "moon's"),
        ("well", ",", " then", ","),
        ("end", "\n", "next", "␣"),
        ("in ", "19", "90s", "1990s"),
    ],
)
def test_whole_word(before, token, after, word):
    assert whole_word(before, token, after) == word


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_the_file_is_read_back_and_is_of_this_sae(task, read, peaks, tmp_path, name):
    rows = list(explanation_rows(task, peaks, list(read), contexts=2))
    write_rows(rows, tmp_path / name)
    found = read_explanations(tmp_path / name)
    found.check(task.sae, LAYER, "any/model")
    assert len(found.rows) + found.empty == len(rows)
    raw = (tmp_path / name).read_bytes()
    text = gzip.decompress(raw) if name.endswith(".gz") else raw
    assert [json.loads(line) for line in text.splitlines()] == rows
    write_rows(rows, tmp_path / name)
    assert (tmp_path / name).read_bytes() == raw
