"""SAELens's registry of published SAEs, where SAELens is installed (the extra `saelens`): RELEASE:ID or RELEASE/ID.

Its YAML file says in which repository and folder an SAE is, and a few things that the folder does not: the factor of
its inputs, settings that are wrong in its configuration. Only the file is read; SAELens itself is imported for the
few families that this package does not read, which it then saves in its own format.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.sae.formats.place import Origin
from saeguard.sae.reference import Reference

PREFIX = "saelens:"
FOREIGN = {"connor_rob_hook_z", "deepseek_r1"}
REFUSED = {
    "temporal": "the features of a temporal SAE depend on the tokens before",
    "mntss_clt_layer_transcoder": "each feature of a cross-layer transcoder writes to several layers",
}


@dataclass(frozen=True)
class Entry:
    """One SAE of the registry."""

    release: str
    id: str
    repo: str
    path: str
    conversion: str
    scale: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def foreign(self) -> bool:
        """Whether SAELens must read it."""
        return self.conversion in FOREIGN

    @property
    def reference(self) -> Reference:
        """Where it is on the hub."""
        return Reference(self.repo, self.path)

    def origin(self, source: str) -> Origin:
        """What a format is told of it."""
        return Origin(source, f"{self.repo}/{self.path}", self.scale, self.overrides)

    def through_saelens(self, source: str, read: Callable[[Path, Origin], SparseAutoencoder]) -> SparseAutoencoder:
        """Let SAELens fetch it and save it in its own format, and read that. Raises `SAEError`."""
        from sae_lens import SAE

        try:
            theirs = SAE.from_pretrained(self.release, self.id)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise SAEError(f"SAELens cannot load {source}: {error}") from error
        with tempfile.TemporaryDirectory(prefix="saeguard-") as folder:
            theirs.save_model(folder)
            return read(Path(folder), self.origin(source))


def find(text: str) -> Entry | None:
    """The SAE a text names in the registry; None where SAELens is not installed or does not know the release.

    With the prefix `saelens:` it must be there. Raises `SAEError` with the nearest names where it is not.
    """
    asked, name = text.startswith(PREFIX), text.removeprefix(PREFIX)
    file = _file()
    if file is None:
        if asked:
            raise SAEError(f"{text} is a name of SAELens, which is not installed: pip install 'saeguard[saelens]'")
        return None
    releases = _releases(file)
    cut = min((at for at in (name.find(":"), name.find("/")) if at > 0), default=len(name))
    release, id = name[:cut], name[cut + 1 :]
    if release not in releases:
        if asked:
            raise _unknown(f"release of {text}", release, releases)
        return None
    entry = releases[release]
    found = next((one for one in entry["saes"] if str(one["id"]) == id), None)
    if found is None:
        if not asked and ":" not in name:
            return None
        raise _unknown(f"SAE of the release {release}", id, [str(one["id"]) for one in entry["saes"]])
    conversion = str(entry.get("conversion_func") or "saelens")
    if conversion in REFUSED:
        raise SAEError(f"{text} cannot be used: {REFUSED[conversion]}. Choose another SAE.")
    scale = found.get("norm_scaling_factor")
    return Entry(
        release, id, entry["repo_id"], str(found["path"]), conversion,
        None if scale is None else float(scale), entry.get("config_overrides") or {},
    )  # fmt: skip


def _file() -> Path | None:
    """The registry's file, without importing SAELens, which takes seconds."""
    spec = find_spec("sae_lens")
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = [path for folder in folders if (path := Path(folder) / "pretrained_saes.yaml").is_file()]
    return found[0] if found else None


@cache
def _releases(file: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        releases: dict[str, Any] = yaml.load(file.read_text("utf-8"), Loader=loader)
    except (OSError, yaml.YAMLError) as error:
        raise SAEError(f"cannot read SAELens's registry {file}: {error}. Install SAELens again.") from error
    return releases


def _unknown(what: str, name: str, known: Any) -> SAEError:
    near = get_close_matches(name, known, n=4, cutoff=0.3) or list(known)[:4]
    return SAEError.mismatch(
        what, found=repr(name), expected=f"a name of SAELens's registry, the nearest: {', '.join(near)}",
        fix="Correct the name, or name the repository on the hub (OWNER/REPO:FOLDER).",
    )  # fmt: skip
