"""Deciphering: odd spelling comes back as words, ordinary text of any kind stays as it is."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from saeguard.attacks import spelling
from saeguard.deciphering import LEAST, deciphered, runs, taken_apart

SENTENCES = (
    "Which planet is closest to the Sun, and why is it hotter than the others in the night sky?",
    "What did the astronomer discover in orbit around the largest planet of the solar system?",
    "Bake the bread for twenty minutes and let it cool before you cut it into slices.",
    "The market price of a good falls when more of it is offered than people want to buy.",
)
ORDINARY = (
    *SENTENCES,
    "for i in range(10): print(f'{i:>3} {hex(i)}')  # x1 = a[0] + b_2",
    "https://example.org/a/b-c?id=4f3e&page=2 and ftp://files.example.org/pub/readme.txt",
    "In 1969, 1971 and 1972; 3.14159, 10,000 and 1e-5; 4th, 5th and 10th of the 1870s.",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "A well-known, up-to-date X-ray of H2O, CO2 and MP3 files at NASA.",
    "Die Sonne ist der Stern im Zentrum unseres Systems. Солнце светит. 太陽は恒星です。",
    "| a | b |\n|---|---|\n| 1 | 2 |\n+--+--+",
)
FLOATS = st.lists(st.integers(-6, 8).map(lambda n: n / 2), max_size=14)


@pytest.fixture(scope="module")
def count() -> Callable[[str], int]:
    """By a small tokenizer that knows the words of the sentences."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = sorted({word.strip(",.?") for text in SENTENCES for word in text.split()})
    known = [*SENTENCES, *(f" {form}" for word in words for form in (word.lower(), word.capitalize()))]
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(known * 3, trainer)
    return cache(lambda word: len(backend.encode(f" {word}").ids))


def share_of_words(text: str, found: str) -> float:
    """Of the words of a text, those that are found in small letters or with one capital."""
    words, there = text.split(), set(found.split())
    return sum(bool({word.lower(), word.capitalize()} & there) for word in words) / len(words)


@pytest.mark.parametrize("text", SENTENCES)
@pytest.mark.parametrize(
    "spell", [spelling.leetspeak, spelling.rot13, spelling.halved, str.upper, spelling.broken, spelling.hyphenated]
)
def test_words_come_back(count, spell, text):
    spelled = spell(text)
    assert share_of_words(text, deciphered(spelled, count)) >= 0.7
    assert share_of_words(text, spelled) <= 0.6


@pytest.mark.parametrize("text", SENTENCES)
def test_base64_comes_back_whole_from_within_a_text(count, text):
    assert deciphered(f"Read this: {spelling.in_base64(text)} now", count) == f"Read this: {text} now"
    assert deciphered(spelling.in_base64(text).rstrip("="), count) == text


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(count, text):
    assert deciphered(text, count) == text


@given(st.binary(min_size=12, max_size=60))
def test_bytes_that_are_no_text_stay_encoded(count, data):
    encoded = base64.b64encode(data).decode()
    text = data.decode(errors="replace")
    if "\ufffd" in text or not all(c.isprintable() or c.isspace() for c in text):
        assert encoded in deciphered(f"x {encoded}", lambda word: 1)


@given(st.lists(st.sampled_from(sorted({w for text in SENTENCES for w in text.split()})), min_size=1, max_size=30))
def test_ordinary_words_in_any_order_stay(count, words):
    assert deciphered(" ".join(words), count).replace(" ", "") == "".join(words)


@given(FLOATS)
def test_runs_are_all_that_pays(gains):
    found = list(runs(gains))
    inside = {i for run in found for i in range(run.start, run.stop)}
    assert len(inside) == sum(run.stop - run.start for run in found)
    for run in found:
        sums = [sum(gains[run.start : end]) for end in range(run.start + 1, run.stop + 1)]
        assert min(sums) > 0
        assert sums[-1] == max(sums) >= LEAST
    for start, stop in combinations(range(len(gains) + 1), 2):
        assert inside & set(range(start, stop)) or sum(gains[start:stop]) < LEAST


@pytest.mark.parametrize("text", SENTENCES)
def test_glued_words_are_taken_apart(count, text):
    bare = text.replace(",", "").rstrip("?.")
    found = taken_apart(bare.replace(" ", ""), count)
    assert found.replace(" ", "") == bare.replace(" ", "")
    assert share_of_words(bare, found) >= 0.7
