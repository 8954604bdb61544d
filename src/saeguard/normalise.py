"""The text behind odd spelling, for detection only: the guard reads it beside the prompt, the model never does.

What is undone:

    NFKC                     full-width, circled, mathematical letters and ligatures become plain ones
    invisible characters     zero-width and direction marks (Unicode category Cf) go
    homoglyphs               letters that look like an ASCII one become it (Unicode's table of confusables, by the
                             package confusable_homoglyphs)
    spaced letters           l i k e   t h i s, l-i-k-e t-h-i-s and l i k e t h i s become words
    encodings                leetspeak, ROT13, Base64, capitals and words broken by a hyphen or a space are read as the
                             words that they stand for where the model's tokenizer finds them ordinary (deciphering.py)
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from saeguard.deciphering import LONGEST_WORD, Count, deciphered, taken_apart
from saeguard.errors import UsageError
from saeguard.windows import pad_rows, text_ids

SPACED = re.compile(r"(?<!\S)\S([ \-._*|])\S(?:\1\S)+(?!\S)")
"""Three or more single characters with one and the same mark between them."""
WORDS = 2**16
"""Words whose number of tokens is kept."""
PAIR = re.compile(r"(?<!\S)\S([ \-._*|])\S(?!\S)")
"""Two of them: a word only in a text that has longer ones."""


def normalised(text: str, count: Count) -> str:
    """The text as it reads, given how many tokens a word takes. Raises `UsageError` where the table of homoglyphs is
    missing."""
    plain = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    plain = "".join(c if c.isascii() else _ascii_twin(c) for c in plain)
    joined = SPACED.sub(lambda found: _together(found, count), plain)
    if joined != plain:
        joined = re.sub(r" {2,}", " ", PAIR.sub(lambda found: _together(found, count), joined))
    return deciphered(joined, count)


@dataclass(frozen=True)
class Again:
    """The normalised form of token sequences: `ids` and `mask` (batch, tokens), padded on the right, and which rows
    `changed` (batch,)."""

    ids: Tensor
    mask: Tensor
    changed: Tensor


class Rereader:
    """Finds the normalised form of token sequences. Raises `UsageError` at once where the table is missing."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._count = lru_cache(WORDS)(lambda word: len(text_ids(tokenizer, f" {word}")))
        normalised("é", self._count)

    def __call__(self, ids: Tensor, attended: Tensor) -> Again | None:
        """Of (batch, tokens); None where no row has another."""
        texts = [self._tokenizer.decode(row[mask]) for row, mask in zip(ids, attended, strict=True)]
        forms = [normalised(text, self._count) for text in texts]
        changed = [form != text for form, text in zip(forms, texts, strict=True)]
        if not any(changed):
            return None
        rows = [text_ids(self._tokenizer, form) or [int(ids[0, -1])] for form in forms]
        return Again(*(part.to(ids.device) for part in (*pad_rows(rows), torch.tensor(changed))))


def _together(found: re.Match[str], count: Count) -> str:
    letters = found[0][::2]
    return letters if len(letters) <= LONGEST_WORD else taken_apart(letters, count)


@cache
def _ascii_twin(character: str) -> str:
    """The ASCII letter that a letter is taken for, else the letter itself."""
    try:
        from confusable_homoglyphs import confusables
    except ImportError as error:
        raise UsageError("normalising needs a table of homoglyphs: pip install 'saeguard[normalise]'") from error
    found: Any = confusables.is_confusable(character, preferred_aliases=["latin"]) if character.isalpha() else False
    twins = [str(one["c"]) for one in found[0]["homoglyphs"]] if found else []
    twins = [twin for twin in twins if len(twin) == 1 and twin.isascii() and twin.isalpha()]
    return next((twin for twin in twins if twin.isupper() == character.isupper()), (twins or [character])[0])
