"""The folder a method writes: a model or a PEFT adapter, and `baseline.json` beside it.

`baseline.json` has method and settings, fingerprints of model, tokenizer and texts, steps, seconds and memory. A folder
is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from saeguard.baselines.catalogue import Trial
from saeguard.baselines.texts import Texts
from saeguard.errors import BaselineError
from saeguard.folders import swap
from saeguard.model import model_fingerprint, tokenizer_fingerprint

RECORD_FILE = "baseline.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def compute_dtype(model: Any) -> torch.dtype:
    """The precision in which a model was loaded: it computes and is saved in it. Raises `BaselineError`."""
    if model.dtype in (torch.float32, torch.bfloat16):
        return model.dtype  # type: ignore[no-any-return]
    raise BaselineError.mismatch(
        "precision of a model that is to be trained", found=model.dtype, expected="float32 or bfloat16",
        fix="Gradients vanish in float16: use --dtype.",
    )  # fmt: skip


def identity(trial: Trial, model: Any, tokenizer: Any, texts: Texts) -> dict[str, Any]:
    """What a result depends on."""
    return {
        "method": type(trial.settings).__name__, "settings": asdict(trial.settings), "seed": trial.seed,
        "layer": trial.layer, "dtype": str(model.dtype),
        "model": model_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer),
        "sae": None if trial.sae is None else trial.sae.fingerprint(), "texts": dict(texts.fingerprints),
    }  # fmt: skip


def digest(record: Mapping[str, Any]) -> str:
    """Names a record by what it holds."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `out` once all is written. Raises `BaselineError`."""
    if out.exists() and not (out / RECORD_FILE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BaselineError(f"{out} exists and was not written by a baseline: nothing was written. Choose another.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            yield new
            swap(new, out, aside=Path(temporary) / "old")
    except OSError as error:
        raise BaselineError(f"cannot write {out}: {error}") from error


def copy_adapter(checkpoint: Path, folder: Path) -> None:
    """The adapter of a training's checkpoint."""
    for name in ADAPTER_FILES:
        shutil.copy2(checkpoint / name, folder / name)


def save_model(model: Any, tokenizer: Any, dtype: torch.dtype, folder: Path) -> None:
    """A whole model with its tokenizer."""
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_record(folder: Path, record: Mapping[str, Any], started: float, device: torch.device) -> None:
    """`baseline.json`. Peak memory is that of the GPU where there is one, else of the process."""
    peak = (
        torch.cuda.max_memory_allocated(device) if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )  # fmt: skip
    content = {**record, "seconds": time.perf_counter() - started, "peak_bytes": peak}
    (folder / RECORD_FILE).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
