"""What a result is of: fingerprints of code and items, and the versions of the libraries that computed it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

from saeguard.evaluation.task import Item

LIBRARIES = ("torch", "transformers", "numpy", "scipy", "saeguard")


@cache
def code_fingerprint() -> str:
    """A hash of this package's source."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def items_fingerprint(items: Sequence[Item]) -> str:
    """A hash of items, whole and in order."""
    text = json.dumps([asdict(item) for item in items], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and the libraries."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
