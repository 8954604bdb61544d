"""Spelling that can be undone: Base64, leetspeak, ROT13, hyphens and spaces in words, capitals.

What is ordinary the model's own tokenizer says: it has long tokens for the words it was made for, and short ones for
anything else. A run of words is read another way where that saves `LEAST` tokens beyond a share that is asked of all:

    gain of a word = share x tokens(word) - tokens(as read)     a run ends where its sum has fallen by `LEAST`

Base64 is decoded where the bytes are printable text of fewer tokens. Ordinary text stays as it is, but for rare runs
(lists of numbers, headlines in capitals). A spelling that takes as few tokens as the word itself is not found.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

Count = Callable[[str], int]
"""How many tokens a word takes, or any piece of text that stands alone."""

LEAST = 3.0
OTHER_WORDS, SAME_WORDS = 0.75, 0.9
"""The share of the tokens that a reading may leave: the same words in other letters are a smaller step."""
LEET = str.maketrans("034578@$", "oeastbas")
ONES = ("i", "l")
ORDINAL = re.compile(r"\d+(?:st|nd|rd|th|s)\W*", re.IGNORECASE)
HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
ENCODED = re.compile(r"[A-Za-z0-9+/]{16,}={0,2}")
LETTERS = re.compile(r"[^\W\d_]+")
LONGEST_WORD = 16


def deciphered(text: str, count: Count) -> str:
    """The text with every run of words as it is likeliest read."""
    text = ENCODED.sub(lambda found: _decoded(found[0], count), text)
    for reading, share in READINGS:
        text = _read(text, reading, share, count)
    return _mended(text, count)


def taken_apart(glued: str, count: Count) -> str:
    """Words that were written without spaces, apart: fewest tokens first, then words of one token, then long ones."""
    return LETTERS.sub(lambda found: _apart(found[0], count), glued)


def runs(gains: Sequence[float]) -> Iterator[slice]:
    """Where a run of gains sums up to `LEAST` or more: from where the sum begins to where it is highest, before it has
    fallen by `LEAST` again."""
    start = end = 0
    total = best = 0.0
    for i, gain in enumerate((*gains, float("-inf"))):
        total += gain
        if total > best:
            best, end = total, i + 1
        elif total <= max(0.0, best - LEAST):
            if best >= LEAST:
                yield slice(start, end)
            start, total, best = i + 1, 0.0, 0.0


def _read(text: str, reading: Callable[[str], Iterable[str]], share: float, count: Count) -> str:
    """The text with the runs of words in another reading that pay."""
    parts = re.split(r"(\s+)", text)
    words = parts[::2]
    forms = [min((*reading(word), word), key=count) for word in words]
    gains = [share * count(word) - count(form) for word, form in zip(words, forms, strict=True)]
    for run in runs(gains):
        parts[2 * run.start : 2 * run.stop : 2] = forms[run]
    return "".join(parts)


def _mended(text: str, count: Count) -> str:
    """The text without spaces inside words, in runs where joining neighbours pays."""
    parts = re.split(r"(\s+)", text)
    words = parts[::2]
    gains = [(SAME_WORDS - 1) * count(word) for word in words]
    for i, (first, second) in enumerate(pairwise(words), 1):
        apart, joined = count(first) + count(second), count(first + second)
        if joined < apart and first.isalpha() and second[:1].isalpha() and gains[i - 1] <= 0:
            gains[i - 1], gains[i] = 0.0, SAME_WORDS * apart - joined
    for run in runs(gains):
        for i in range(max(run.start, 1), run.stop):
            if gains[i] > 0:
                parts[2 * i - 1] = ""
    return "".join(parts)


def _decoded(encoded: str, count: Count) -> str:
    """What Base64 stands for, or the same where that is no text."""
    bare = encoded.rstrip("=")
    try:
        text = base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return encoded
    printable = all(c.isprintable() or c.isspace() for c in text)
    return text if printable and count(text) < count(encoded) else encoded


def _letters_for_digits(word: str) -> Iterator[str]:
    """As leetspeak: a word of letters, and of digits or signs that stand for letters."""
    if ORDINAL.fullmatch(word):
        return
    for one in ONES:
        letters = word.translate(LEET).replace("1", one)
        if letters != word and any(c.isalpha() for c in word) and not any(c.isdigit() for c in letters):
            yield letters


def _thirteen_further(word: str) -> Iterator[str]:
    yield codecs.encode(word, "rot13")


def _without_hyphens(word: str) -> Iterator[str]:
    yield HYPHEN.sub("", word)


def _without_capitals(word: str) -> Iterator[str]:
    if word.isupper():
        yield from (word.lower(), word.capitalize())


READINGS = (
    (_letters_for_digits, OTHER_WORDS), (_thirteen_further, OTHER_WORDS), (_without_hyphens, OTHER_WORDS),
    (_without_capitals, SAME_WORDS),
)  # fmt: skip


def _apart(glued: str, count: Count) -> str:
    best: list[tuple[float, int, tuple[str, ...]]] = [(0.0, 0, ())]
    for end in range(1, len(glued) + 1):
        words = (glued[start:end] for start in range(max(0, end - LONGEST_WORD), end))
        best.append(min(_followed(best[end - len(word)], word, count(word)) for word in words))
    return " ".join(best[-1][-1])


def _followed(before: tuple[float, int, tuple[str, ...]], word: str, tokens: int) -> tuple[float, int, tuple[str, ...]]:
    """Words with one more: their tokens (each beyond the first of a word a little more), their lengths, and they."""
    return before[0] + 1.1 * tokens - 0.1, before[1] - len(word) ** 2, (*before[2], word)
