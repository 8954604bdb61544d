"""What a check found, and the verdict that follows from all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

from saeguard.errors import SAEMismatchError

Level = Literal["mismatch", "warning", "note"]
LEVELS: tuple[Level, ...] = ("mismatch", "warning", "note")
"""From worst to least. A note is worth knowing and changes no verdict."""
Verdict = Literal["fits", "fits with a warning", "does not fit"]


@dataclass(frozen=True)
class Finding:
    """One thing worth telling: what was looked at, what was found, what was expected, what to do about it."""

    level: Level
    what: str
    found: str
    expected: str
    fix: str

    @classmethod
    def of(cls, error: SAEMismatchError) -> Self:
        """The finding of an SAE that cannot even be run on this model."""
        return cls("mismatch", error.what, str(error.found), str(error.expected), error.fix)

    def error(self, more: str = "") -> SAEMismatchError:
        """The error that refuses it; `more` is added to what to do."""
        fix = f"{self.fix} {more}".strip()
        return SAEMismatchError.mismatch(self.what, found=self.found, expected=self.expected, fix=fix)


def verdict_of(findings: Iterable[Finding]) -> Verdict:
    """The worst level decides."""
    levels = {finding.level for finding in findings}
    if "mismatch" in levels:
        return "does not fit"
    return "fits with a warning" if "warning" in levels else "fits"
