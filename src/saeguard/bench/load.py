"""How fast an SAE is read from each format, and how much memory that takes, each in a process of its own.

The SAE is random and JumpReLU, or what the format has in its place. Memory is the growth of the peak of resident
memory while loading, pages of the mapped file included, over the size of the file.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D_MODEL, D_SAE = 2304, 16384
LOAD = """
import json, resource, sys, time
import torch
from saeguard.sae.autoencoder import SparseAutoencoder
import saeguard.sae.load
torch.zeros(64, 64) @ torch.zeros(64, 64)
def peak():
    try:
        return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
start, cpu = time.perf_counter(), time.process_time()
sae = SparseAutoencoder.load(sys.argv[1])
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "bytes": peak() - before}))
"""
PLAIN = ("W_enc", "W_dec", "b_enc", "b_dec")
LINEAR = ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")
Files = Mapping[str, Mapping[str, Any]]
POINT = "blocks.3.hook_resid_post"
SAELENS = {"architecture": "jumprelu", "metadata": {"hook_name": POINT}, "normalize_activations": "none"}
OPENMOSS = {"act_fn": "jumprelu", "hook_point_in": POINT}
NORM = {f"dataset_average_activation_norm.{POINT}": torch.tensor(90.0)}
LLAMA = {
    "hook_point_in": POINT, "jump_relu_threshold": 1.0, "d_model": 4096,
    "dataset_average_activation_norm": {"in": 90.0, "out": 90.0},
}  # fmt: skip


@dataclass(frozen=True)
class Random:
    """Random weights by the names of SAELens and of linear layers, whose matrices are stored transposed."""

    plain: dict[str, Tensor]
    linear: dict[str, Tensor]

    @classmethod
    def of(cls, d_model: int, d_sae: int) -> Random:
        W = torch.randn(d_model, d_sae, generator=torch.Generator().manual_seed(0)) / d_model**0.5
        biases = torch.zeros(d_sae), torch.ones(d_model)
        return cls(
            dict(zip(PLAIN, (W, W.T, *biases), strict=True)),
            dict(zip(LINEAR, (W.T, W, *biases), strict=True)),
        )

    @property
    def jump(self) -> dict[str, Tensor]:
        return self.plain | {"threshold": torch.ones_like(self.plain["b_enc"])}

    def some(self, *names: str) -> dict[str, Tensor]:
        """Those of any of the names."""
        return {name: (self.linear | self.plain)[name] for name in names}

    def renamed(self, *pairs: str) -> dict[str, Tensor]:
        """By other names: `theirs=ours`."""
        return {theirs: self.some(ours)[ours] for theirs, _, ours in (pair.partition("=") for pair in pairs)}


FORMATS: dict[str, Callable[[Random], Files]] = {
    "SAELens": lambda r: {"sae_weights.safetensors": r.jump, "cfg.json": SAELENS},
    "SAELens, bfloat16": lambda r: {
        "sae_weights.safetensors": {name: tensor.bfloat16() for name, tensor in r.jump.items()}, "cfg.json": SAELENS,
    },
    "SAELens, TopK in decoder norms": lambda r: {
        "sae_weights.safetensors": r.plain,
        "cfg.json": SAELENS | {"architecture": "topk", "k": 64, "rescale_acts_by_decoder_norm": True},
    },
    "Gemma Scope 1": lambda r: {"layer_3/params.npz": r.jump},
    "Gemma Scope 2": lambda r: {
        "resid_post/layer_3_width_16k/params.safetensors": {
            name.replace("W", "w"): tensor for name, tensor in r.jump.items()
        },
    },
    "sparsify": lambda r: {
        "layers.3/sae.safetensors": r.some("encoder.weight", "encoder.bias", "W_dec", "b_dec"),
        "layers.3/cfg.json": {"k": 64},
    },
    "dictionary_learning": lambda r: {
        "ae.pt": r.some("encoder.weight", "encoder.bias", "decoder.weight", "b_dec") | {"threshold": torch.ones(())},
        "config.json": {"trainer": {"dict_class": "BatchTopKSAE", "layer": 3}},
    },
    "Llama Scope 1": lambda r: {"checkpoints/final.safetensors": r.linear, "hyperparams.json": LLAMA},
    "Llama Scope R1-distill": lambda r: {
        "sae_weights.safetensors": r.linear | NORM | r.renamed("log_jumprelu_threshold=b_enc"), "config.json": OPENMOSS,
    },
    "llamascopium": lambda r: {
        "sae_weights.safetensors": NORM | r.renamed(
            "W_E=W_enc", "W_D=W_dec", "b_E=b_enc", "b_D=b_dec", "activation_function.log_jumprelu_threshold=b_enc"
        ),
        "config.json": OPENMOSS,
    },
    "Goodfire": lambda r: {
        "NAME-SAE-l19.pth": {name.replace(".", "_linear."): tensor for name, tensor in r.linear.items()}
    },
    "Qwen-Scope": lambda r: {
        "SAE-Res-NAME-W16K-L0_50/layer3.sae.pt": r.plain | r.renamed("W_enc=W_dec", "W_dec=W_enc")
    },
    "circuit-tracer": lambda r: {"layer_3.safetensors": r.plain | r.renamed("W_enc=W_dec")},
}  # fmt: skip


def load_times(d_model: int = D_MODEL, d_sae: int = D_SAE, repeats: int = 3) -> Iterator[dict[str, Any]]:
    """One row a format: `format`, `megabytes` of its file, `seconds` and `cpu_seconds` (of the run of median time),
    `memory` (the largest growth of the peak, over the file's size).
    """
    with tempfile.TemporaryDirectory(prefix="saeguard-") as temporary:
        for name, files in FORMATS.items():
            weights = write_format(Path(temporary) / name, files(Random.of(d_model, d_sae)))
            size = weights.stat().st_size
            runs = sorted((_load(weights) for _ in range(repeats)), key=lambda run: float(run["seconds"]))
            weights.unlink()
            yield {
                "format": name,
                "megabytes": size / 1e6,
                **{key: runs[len(runs) // 2][key] for key in ("seconds", "cpu_seconds")},
                "memory": max(run["bytes"] for run in runs) / size,
            }


def _load(path: Path) -> dict[str, Any]:
    command = [sys.executable, "-c", LOAD, str(path)]
    row: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return row


def write_format(folder: Path, files: Files) -> Path:
    """Write weights and settings in a folder; the path of the weights."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            (folder / name).write_text(json.dumps(content), "utf-8")
        else:
            _write_weights(folder / name, {key: tensor.contiguous().clone() for key, tensor in content.items()})
    return next(folder / name for name in files if not name.endswith(".json"))


def _write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    else:
        torch.save(tensors, path)
