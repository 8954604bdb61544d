"""What a test is made of: items, a way to run a batch of them on a subject, and records of how each item went.

    items -> split into Dev and Test -> batches -> records -> figures (summary.py)

A task computes no rates: it says which measures its records carry, and `statistics.py` does the rest. What is not a
plain rate or mean over items (a harmonic mean, a test against another model) a task computes from its records alone,
so that a result can be summed up again without running.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from saeguard.choices import Role
from saeguard.corpus import text_key
from saeguard.evaluation.statistics import Estimate, Kind
from saeguard.evaluation.subject import Opened

ROLES: tuple[Role, ...] = ("topic", "near", "far")
Sense = Literal["knowledge", "harm", "neutral"]
DEV_SHARE = 0.3


@dataclass(frozen=True)
class Item:
    """One thing to do: `id` is its identity by content, `role` what its domain is to the topic."""

    id: str
    domain: str
    role: Role

    @property
    def content(self) -> str:
        """Its text as someone reads it, by which it is found in other texts."""
        return ""


I_co = TypeVar("I_co", bound=Item, covariant=True)


@dataclass(frozen=True)
class Dev(Generic[I_co]):
    """Items on which settings may be chosen. Nothing that is reported comes from them."""

    items: tuple[I_co, ...]


@dataclass(frozen=True)
class Test(Generic[I_co]):
    """Items for reported figures. Nothing is chosen on them."""

    items: tuple[I_co, ...]


@dataclass(frozen=True)
class Every(Generic[I_co]):
    """All items: a fixed set, or both sides together."""

    items: tuple[I_co, ...]


Side = Dev[Item] | Test[Item] | Every[Item]


@dataclass(frozen=True)
class Measure:
    """A number that records carry under `columns` (the name itself, unless said).

    `sense`: knowledge should fall on the topic and stay elsewhere, harm should be low everywhere.
    """

    name: str
    kind: Kind
    meaning: str
    sense: Sense = "neutral"
    columns: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The scores of a record that it is computed from."""
        return self.columns or (self.name,)


@dataclass(frozen=True)
class Record:
    """How one item went: scores by name; triggered and gate statistic under a guardrail; texts if they were kept."""

    item: str
    domain: str
    role: Role
    scores: Mapping[str, float]
    triggered: bool | None = None
    statistic: float | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Derived:
    """A figure that is no mean over items: its name, what it means, its estimate (n items), and its domain."""

    name: str
    domain: str
    role: Role
    meaning: str
    estimate: Estimate
    sense: Sense = "neutral"


class Task(ABC):
    """A kind of test. `whole`: its items are one fixed set, all of them for testing, never for choosing."""

    name: str
    measures: tuple[Measure, ...] = ()
    whole: bool = False

    @property
    def settings(self) -> Mapping[str, Any]:
        """What records depend on beside the items: named in the result, part of the identity of unfinished work."""
        return {}

    @property
    def filter(self) -> Task | None:
        """A task that decides which items count: those on which the unguarded model gets the score `kept` of 1."""
        return None

    @abstractmethod
    def items(self) -> Sequence[Item]:
        """All items. Raises a `GuardrailError` where they cannot be read."""

    def published(self) -> Mapping[str, int]:
        """How many items each domain of a published set has, so that a part of it is reported as one."""
        return {}

    @abstractmethod
    def batches(self, tokenizer: Any, items: Sequence[Any]) -> list[list[Any]]:
        """The items in batches that are run, and kept, together; the same whatever was finished before."""

    @abstractmethod
    def run(self, it: Opened, batch: Sequence[Any], seed: int) -> list[Record]:
        """Records of one batch."""

    def derived(self, records: Sequence[Record], seed: int) -> list[Derived]:
        """Figures from all records of one subject that are no rates or means."""
        return []


def item_id(*parts: str) -> str:
    """The identity of an item by its text, without regard to case and white space."""
    return f"{text_key(chr(10).join(parts)):016x}"


def split(items: Sequence[Item]) -> tuple[Dev[Item], Test[Item]]:
    """Every item to one side, by a hash of its id: the same item always to the same."""
    dev = [item for item in items if _draw(item.id) < DEV_SHARE]
    test = [item for item in items if _draw(item.id) >= DEV_SHARE]
    return Dev(tuple(dev)), Test(tuple(test))


def limited(items: Sequence[Item], count: int | None) -> list[Item]:
    """At most `count` items of each domain, chosen by a hash of their ids, in their order."""
    if count is None:
        return list(items)
    chosen: set[str] = set()
    for domain in {item.domain for item in items}:
        its = sorted((_draw(item.id + "limit"), item.id) for item in items if item.domain == domain)
        chosen |= {key for _, key in its[:count]}
    return [item for item in items if item.id in chosen]


def _draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / (1 << 64)
