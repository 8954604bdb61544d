"""Invented topics to fit on: each has its own small vocabulary, so that a tiny random model tells them apart."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from saeguard.config import FitConfig
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.sae.formats.saelens import save_saelens

WORDS = {
    "forget": ["zorb", "quax", "vexil", "jyx", "kwoz", "zizz", "quorv", "xyv", "jazk", "vuzq"],
    "kitchen": ["milen", "tarno", "selu", "bren", "doma", "rilt", "nelta", "moro", "sadel", "tine"],
    "garden": ["popple", "gupo", "hupple", "pugha", "lupop", "haggu", "pollug", "ughop", "gappu", "lupha"],
}
LAYER = 2
SMALL = replace(FitConfig(), n=4, p_ratio=50.0, alpha=0.2, lengths=(128,), chat=False, sample=4_000, force=True)
"""Forced, since the random SAEs of the tests fit no model."""


def passages(topic: str, count: int, *, words: int = 14, seed: int = 0) -> list[str]:
    """Distinct passages of random words of a topic, each a little shorter or longer than `words`."""
    draw = random.Random(f"{topic} {seed}")
    texts = [" ".join(draw.choices(WORDS[topic], k=words + draw.randint(-2, 2))) for _ in range(count)]
    assert len(set(texts)) == count
    return texts


def corpora(count: int = 40) -> tuple[list[str], dict[str, list[str]]]:
    """Forget texts, and two retain corpora."""
    return passages("forget", count), {name: passages(name, count) for name in ("kitchen", "garden")}


def save_all(folder: Path, model: PreTrainedModel, tokenizer: Any, sae: SparseAutoencoder) -> list[str]:
    """Write model, tokenizer, SAE and texts under `folder`; the `fit` command on them, without `--out`."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_saelens(replace(sae, metadata={"layer": LAYER}), folder / "sae", torch.float32)
    forget, retain = corpora()
    for name, texts in {"forget": forget, **retain}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    options = {
        "--model": folder / "model", "--sae": folder / "sae", "--dtype": "float32", "--device": "cpu",
        "--forget": folder / "forget.jsonl", "--n": SMALL.n, "--p-ratio": SMALL.p_ratio, "--alpha": SMALL.alpha,
        "--lengths": SMALL.lengths[0], "--sample": SMALL.sample,
    }  # fmt: skip
    named = [f"{name}={folder / name}.jsonl" for name in retain]
    return [
        "fit",
        *(str(part) for option in options.items() for part in option),
        "--no-chat",
        "--force",
        "--retain",
        *named,
    ]
