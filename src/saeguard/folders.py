"""Folders of one JSON and one safetensors file, as everything fitted is kept: written whole or not at all, every byte
under a digest, nothing ever unpickled.

The JSON is UTF-8 in canonical form. `tensors_sha256` is the digest of the other file's bytes, `sha256` that of the
canonical form without itself.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeguard.errors import ArtifactDamagedError, ArtifactError, ArtifactVersionError
from saeguard.files import follow_umask


@dataclass(frozen=True)
class Kind:
    """A kind of folder: what it is called, its files, and the version of its format."""

    name: str
    json_file: str
    tensor_file: str
    version: int

    def is_at(self, folder: str | Path) -> bool:
        """Whether a folder is of this kind."""
        return (Path(folder) / self.json_file).is_file()


def write_folder(
    kind: Kind, target: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], others: Mapping[str, str]
) -> None:
    """Write the folder in the place of an older one of its kind, whose other files stay; `others` are texts by name.

    Raises `ArtifactError`.
    """
    if target.exists() and not kind.is_at(target) and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"{target} exists and is not a {kind.name}: nothing was written. Choose another folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            _write_files(kind, new, content, tensors)
            for name, text in others.items():
                (new / name).write_text(text, "utf-8")
            _keep_others(target, new)
            swap(new, target, aside=Path(temporary) / "old")
    except (OSError, ValueError, SafetensorError, shutil.Error) as error:
        raise ArtifactError(f"cannot write the {kind.name} {target}: {error}. Nothing was changed.") from error


def read_folder(kind: Kind, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of the JSON file, and the tensors. Raises an `ArtifactError` on any damage or foreign format."""
    content = _read_json(kind, folder / kind.json_file)
    path = folder / kind.tensor_file
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != content["tensors_sha256"]:
            raise ArtifactDamagedError(f"{path} was altered: its digest is not the recorded one")
        return content, load_file(path)
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactDamagedError(f"cannot read the {kind.name} {folder}: {error!r}") from error


def canonical(content: Mapping[str, Any]) -> str:
    """JSON in the one form in which it is written and hashed."""
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _write_files(kind: Kind, folder: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    path = folder / kind.tensor_file
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
    follow_umask(path)
    whole = {
        **content,
        "format_version": kind.version,
        "tensors_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (folder / kind.json_file).write_text(canonical(whole | {"sha256": _digest(whole)}), "utf-8")


def _keep_others(old: Path, new: Path) -> None:
    """Copy what else lies in the folder, such as a page that `inspect` drew."""
    for path in old.iterdir() if old.exists() else ():
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        elif not (new / path.name).exists():
            shutil.copy2(path, new / path.name, follow_symlinks=False)


def swap(new: Path, target: Path, *, aside: Path) -> None:
    """Put `new` in the place of `target`, or leave `target` as it was."""
    if target.exists():
        target.replace(aside)
    try:
        new.replace(target)
    except OSError:
        if aside.exists():
            aside.replace(target)
        raise


def _read_json(kind: Kind, path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes().decode("utf-8")
        content = json.loads(raw)
        version = content["format_version"]
        digest = content.pop("sha256", None)
        whole = digest == _digest(content) and raw == canonical(content | {"sha256": digest})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactDamagedError(f"cannot read {path}: {error!r}") from error
    if version != kind.version:
        raise ArtifactVersionError.mismatch(
            f"format version of {path}", found=version, expected=kind.version, fix="Fit it again, or update saeguard."
        )
    if not whole:
        raise ArtifactDamagedError(f"{path} was altered: its digest is not the recorded one. Fetch or fit it again.")
    return dict(content)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()
