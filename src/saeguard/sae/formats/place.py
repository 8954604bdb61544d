"""Where an SAE is, a folder and the file in it that was named, if one was; and what is known of it beside its files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeguard.errors import SAEError

LAYER = re.compile(r"(?<![A-Za-z])(?:blocks|layers|layer|h)[._]?(\d+)(?!\d)|-[lL](\d+)(?![\d_])")


@dataclass(frozen=True)
class Origin:
    """What was asked for, and what is known of it that its files may not say.

    `source`: in the user's words. `address`: the repository and the path in it, or the local path; families name
    layers and models there. `scale`: the factor by which inputs are scaled, from a registry; `overrides`: settings
    that a registry puts in the place of those in the SAE's configuration.
    """

    source: str
    address: str
    scale: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A folder, and the file in it that was named."""

    folder: Path
    named: Path | None = None

    @classmethod
    def of(cls, path: Path) -> Place:
        """A folder, or a file and the folder around it."""
        return cls(path) if path.is_dir() else cls(path.parent, path)

    def file(self, *patterns: str) -> Path | None:
        """The named file if it matches a pattern; where none was named, the only one that matches.

        Raises `SAEError` where several match: which is meant must be said.
        """
        if self.named is not None:
            return self.named if any(self.named.match(pattern) for pattern in patterns) else None
        found = sorted(path for pattern in patterns for path in self.folder.glob(pattern))
        if len(found) > 1:
            raise SAEError(
                f"{self.folder} holds {len(found)} SAEs: {[path.name for path in found][:6]}. Name one of the files."
            )
        return found[0] if found else None


def layer_in(text: str) -> int | None:
    """The last layer number in a hook name, a module path or a folder: `blocks.3.hook_mlp_out`, `layer_3/width_16k`."""
    found = [next(filter(None, groups)) for groups in LAYER.findall(text)]
    return int(found[-1]) if found else None
