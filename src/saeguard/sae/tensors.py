"""Reading weights from what SAEs are published in: safetensors, npz, and torch files without ever unpickling code."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saeguard.errors import SAEError

UnpicklingError: type[Exception] = vars(torch.serialization)["pickle"].UnpicklingError
TORCH_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, UnpicklingError,
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `SAEError`."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SAEError(f"cannot read {path}: {error}. Fetch it again.") from error
    if not isinstance(content, dict):
        raise SAEError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file, from its header alone."""
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def read_tensors(path: Path, names: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Tensor]:
    """The named tensors, in float32; those of `optional` that are there. Raises `SAEError`.

    Only these are read from a safetensors or npz file. Anything but finite floating-point numbers is refused;
    a single number may also be whole. Float32 is mapped from the file, not copied, and may be changed in place: the
    mapping is private, so that the file stays as it is.
    """
    names = list(names)
    wanted = [*names, *optional]
    read = {".safetensors": _safetensors, ".npz": _npz}.get(path.suffix, _torch)
    present, found = read(path, wanted)
    if missing := set(names) - found.keys():
        raise SAEError.mismatch(
            f"tensors in {path}", found=sorted(present)[:12], expected=sorted(names), fix=f"It lacks {sorted(missing)}."
        )
    return {name: _checked(name, tensor, path) for name, tensor in found.items()}


def _checked(name: str, tensor: Tensor, path: Path) -> Tensor:
    if tensor.dtype not in DTYPES and tensor.dim() > 0:
        raise SAEError.mismatch(
            f"type of {name} in {path}", found=tensor.dtype, expected="float16, bfloat16, float32 or float64",
            fix="Use the SAE as it was published, not a quantised copy.",
        )  # fmt: skip
    tensor = tensor.float()
    # The extremes are NaN where any value is, and need no second tensor.
    if tensor.numel() > 0 and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise SAEError(f"{name} in {path} holds NaN or infinite values: the file is damaged. Fetch it again.")
    return tensor


def _safetensors(path: Path, wanted: Iterable[str]) -> tuple[set[str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            present = set(file.keys())
            return present, {name: file.get_tensor(name) for name in wanted if name in present}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _npz(path: Path, wanted: Iterable[str]) -> tuple[set[str], dict[str, Tensor]]:
    """Names in an npz file are compared without case: `W_enc` and `w_enc` are both in use."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            stored = {name.lower(): name for name in file.files}
            found = {name: torch.from_numpy(file[stored[name.lower()]]) for name in wanted if name.lower() in stored}
            return set(file.files), found
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


def _torch(path: Path, wanted: Iterable[str]) -> tuple[set[str], dict[str, Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except TORCH_ERRORS as error:
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        raise SAEError(f"{path} holds {type(content).__name__}, expected a dictionary of tensors")
    return set(map(str, content)), {n: content[n] for n in wanted if isinstance(content.get(n), Tensor)}


def _unreadable(path: Path, error: Exception) -> SAEError:
    return SAEError(f"cannot read {path}: {error}. It is truncated, damaged or of another kind; fetch it again.")
