"""Text that is on both sides: judged items that the guardrail was fitted on, and items that repeat each other.

Of a fitted corpus the test split does not count: nothing is fitted on it. Two texts are the same if they agree without
regard to case and white space (`corpus.text_key`). A question also counts if it stands, whole, in a fitted text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saeguard.corpus import Corpus, text_key
from saeguard.evaluation.task import Item

MIN_CHARACTERS = 30


def fit_duplicates(fitted: Mapping[str, Corpus], items: Sequence[tuple[str, Item]]) -> list[dict[str, Any]]:
    """What is on both sides: entries of task, domain, item and the corpus it was found in.

    `items` are (task, item). Items shorter than `MIN_CHARACTERS` are only compared whole.
    """
    return [
        {"task": task, "domain": item.domain, "item": item.id, "corpus": name}
        for name, corpus in fitted.items()
        for task, item in items_in([d.text for d in corpus.documents() if d.split != "test"], items)
    ]


def items_in(texts: Sequence[str], items: Sequence[tuple[str, Item]]) -> list[tuple[str, Item]]:
    """The items that stand in these texts, by the rule above."""
    plain = [_plain(text) for text in texts]
    keys, everything = {text_key(text) for text in plain}, "\n".join(plain)
    found = []
    for task, item in items:
        text = _plain(item.content)
        if (len(text) >= MIN_CHARACTERS and text in everything) or text_key(text) in keys:
            found.append((task, item))
    return found


def shared_items(items: Sequence[tuple[str, Item]]) -> list[dict[str, Any]]:
    """Items whose text stands in another domain of the same task too, entry as above."""
    first: dict[tuple[str, int], str] = {}
    found = []
    for task, item in items:
        if not item.content:
            continue
        other = first.setdefault((task, text_key(item.content)), item.domain)
        if other != item.domain:
            found.append({"task": task, "domain": item.domain, "item": item.id, "corpus": other})
    return found


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
