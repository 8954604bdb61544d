"""The starter set and the embedded SAE: what the quickstart stands on."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import saeguard
from saeguard.corpus import read_texts, text_key
from saeguard.embedded import LAYER, NEAR, StarterSet, embedded_sae, starter_set
from saeguard.sae.autoencoder import JumpReLU

RUN = 8
ASSETS = Path(saeguard.__file__).parent / "assets"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def starter() -> StarterSet:
    return starter_set()


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def runs(text: str) -> set[tuple[str, ...]]:
    its = words(text)
    return {tuple(its[i : i + RUN]) for i in range(len(its) - RUN + 1)}


def all_passages(starter: StarterSet) -> dict[str, list[str]]:
    return {path.stem: list(read_texts(str(path))) for path in (starter.forget, *starter.retain.values())}


def test_there_is_a_topic_with_two_neighbours_chat_and_at_least_eight_retain_domains(starter):
    assert starter.forget.stem not in starter.retain
    assert {*NEAR, "chat"} <= starter.retain.keys()
    assert len(starter.retain) >= 8
    assert sum(map(len, all_passages(starter).values())) >= 300


def test_there_are_enough_questions_of_each_role(starter):
    counts = Counter()
    for name, questions in starter.questions.items():
        role = StarterSet.role(name)
        counts[name if role == "near" else role] += len(questions)
    assert counts["topic"] >= 100
    assert all(counts[name] >= 50 for name in NEAR)
    assert counts["far"] >= 150


def test_every_question_has_four_distinct_options(starter):
    for name, questions in starter.questions.items():
        for question in questions:
            options = {option.strip().lower() for option in question.choices}
            assert len(question.choices) == len(options) == 4, f"{name}: {question.text}"
            assert "" not in options


def test_no_question_is_asked_twice(starter):
    keys = Counter(text_key(question.text) for its in starter.questions.values() for question in its)
    assert [key for key, count in keys.items() if count > 1] == []


def test_the_right_answer_is_as_often_at_each_place(starter):
    for name, questions in starter.questions.items():
        places = Counter(question.answer for question in questions)
        assert set(places) == {0, 1, 2, 3}, name
        assert max(places.values()) - min(places.values()) <= 2, f"{name}: {places}"


def test_no_passage_is_in_two_domains(starter):
    keys = Counter(key for texts in all_passages(starter).values() for key in {text_key(text) for text in texts})
    assert [key for key, count in keys.items() if count > 1] == []


def test_no_passage_holds_a_question_that_judges(starter):
    texts = [" ".join(words(text)) for its in all_passages(starter).values() for text in its]
    asked = [" ".join(words(question.text)) for its in starter.questions.values() for question in its]
    assert [question for question in asked if any(question in text for text in texts)] == []


def test_no_passage_shares_a_run_of_eight_words_with_a_question(starter):
    known = {run for its in starter.questions.values() for question in its for run in runs(question.text)}
    shared = {run for texts in all_passages(starter).values() for text in texts for run in runs(text) & known}
    assert known
    assert shared == set()


def test_the_embedded_sae_is_small_and_loads():
    size = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file())
    sae = embedded_sae()
    assert size <= 12 * MEGABYTE
    assert (sae.layer, sae.d_model) == (LAYER, 576)
    assert isinstance(sae.activation, JumpReLU)
    assert all(bool(tensor.isfinite().all()) for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), atol=0.01, rtol=0)
