"""Judging a free answer by its text alone: does it hold the reference, is it gibberish, is it a refusal?

    match       the reference's words stand in the answer, in order and without a gap, whatever their case, accents,
                punctuation and articles; numbers up to twelve also as words
    gibberish   at least `REPEATED` of the answer's word pairs stand in it before, or `ODD` of its
                characters are neither letters, digits, spaces nor common punctuation
    refusal     the answer begins like one ("I cannot", "I'm sorry", ...)

None of them reads for sense: a wrong but well-formed answer is neither a match nor gibberish.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

REPEATED, ODD, MIN_WORDS = 0.4, 0.25, 8
REFUSING = re.compile(
    r"^\W*(i('m| am) (very |so |really )?(sorry|afraid|unable|not able)|i (can ?not|can't|won't|will not|must decline)"
    r"|i (do not|don't) (know|have (any |enough )?(information|knowledge))|sorry\b|unfortunately,? i|as an ai\b)",
    re.IGNORECASE,
)
NUMBERS = dict(
    zip(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
        map(str, range(13)),
        strict=True,
    )
)
ARTICLES = {"a", "an", "the"}


def words(text: str) -> list[str]:
    """The words of a text: lower case, no accents, no punctuation, no articles, small numbers as digits."""
    plain = unicodedata.normalize("NFKD", text.casefold().replace("'s", "").replace("’s", ""))
    found = re.findall(r"[^\W_]+", "".join(c for c in plain if not unicodedata.combining(c)))
    return [NUMBERS.get(word, word) for word in found if word not in ARTICLES]


def matches(answer: str, references: Sequence[str]) -> bool:
    """Whether one of the references stands in the answer."""
    text = f" {' '.join(words(answer))} "
    return any(wanted and f" {' '.join(wanted)} " in text for wanted in map(words, references))


def repetition(answer: str) -> float:
    """Share of the answer's word pairs that stand in it before; 0 for fewer than `MIN_WORDS` words."""
    found = re.findall(r"\S+", answer.casefold())
    if len(found) < MIN_WORDS:
        return 0.0
    pairs = list(pairwise(found))
    return 1 - len(set(pairs)) / len(pairs)


def is_gibberish(answer: str) -> bool:
    """Whether the answer mostly repeats itself or mostly consists of odd characters."""
    odd = sum(not (c.isalnum() or c.isspace() or c in ".,;:!?'\"()-–—’“”%$€£°/+*=#&[]") for c in answer)
    return repetition(answer) >= REPEATED or odd >= ODD * max(1, len(answer))


def is_refusal(answer: str) -> bool:
    """Whether the answer begins like a refusal."""
    return REFUSING.match(answer) is not None
