"""What the SAE's file says of its model, layer, text and sparsity, against what it is used with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from saeguard.doctor.finding import Finding
from saeguard.doctor.reading import WINDOW_TOKENS, Subject
from saeguard.model import text_config
from saeguard.sae.autoencoder import SparseAutoencoder, TopK
from saeguard.windows import bos_ids

TUNED = re.compile(r"-(it|instruct|chat|sft|dpo)\b")
BASE = re.compile(r"-(pt|base|hf|it|instruct|chat|sft|dpo)\b")
ALIASES = {"gpt2-small": "gpt2"}
L0_IN_NAME = re.compile(r"(?:average_l0|l0)[_-](\d+)", re.IGNORECASE)
FIX_MODEL = "Use the SAE's own model, or see in the figures above how well it does on this one."


def declared_findings(subject: Subject) -> list[Finding]:
    """All findings of what is declared."""
    found = (
        layer(subject.sae, subject.layer),
        model_name(subject.sae, subject.model),
        bos(subject.sae, subject.tokenizer),
        context(subject.sae),
    )
    return [finding for finding in found if finding is not None]


def layer(sae: SparseAutoencoder, used: int) -> Finding | None:
    """Another layer than the file's is a mismatch whatever the figures are."""
    if sae.layer is None or sae.layer == used:
        return None
    return Finding(
        "mismatch", "layer", str(used), f"{sae.layer}, on which the SAE was trained", f"Use layer {sae.layer}."
    )


def model_name(sae: SparseAutoencoder, model: nn.Module) -> Finding | None:
    """A name is no proof, so another one only warns; a local folder's name says nothing."""
    said, name = sae.metadata.get("model_name"), str(getattr(text_config(model), "_name_or_path", ""))
    if not said or not name or Path(name).is_dir() or _plain(said) == _plain(name):
        return None
    if BASE.sub("", _plain(said)) != BASE.sub("", _plain(name)):
        return Finding("warning", "model", name, f"{said}, on which the SAE was trained", FIX_MODEL)
    if bool(TUNED.search(_plain(said))) == bool(TUNED.search(_plain(name))):
        return None
    return Finding("warning", "variant of the model", name, f"{said}, on which the SAE was trained", FIX_MODEL)


def bos(sae: SparseAutoencoder, tokenizer: Any) -> Finding | None:
    """Whether sequences begin as they did in training."""
    said, found = sae.metadata.get("prepend_bos"), bool(bos_ids(tokenizer))
    if not isinstance(said, bool) or said == found:
        return None
    return Finding(
        "warning", "BOS in front of a text", "yes" if found else "no", f"{'yes' if said else 'no'}, as in training",
        "Look at the explained variance; where it is low, set the tokenizer's add_bos_token as in training.",
    )  # fmt: skip


def context(sae: SparseAutoencoder) -> Finding | None:
    """Whether it was trained on sequences as long as those examined."""
    said = sae.metadata.get("context_size")
    if not isinstance(said, int) or said >= WINDOW_TOKENS:
        return None
    return Finding(
        "note", "length of sequences", f"up to {WINDOW_TOKENS} tokens", f"{said}, as in training",
        "Look at how the gate does by length.",
    )  # fmt: skip


def declared_l0(sae: SparseAutoencoder) -> float | None:
    """Active features a token that the file or its name promises."""
    if isinstance(sae.activation, TopK):
        return float(sae.activation.k)
    for key in ("l0", "k"):
        if isinstance(value := sae.metadata.get(key), int | float) and value > 0:
            return float(value)
    named = L0_IN_NAME.search(sae.source)
    return float(named[1]) if named else None


def _plain(name: Any) -> str:
    """A model's name without its owner, in lower case."""
    plain = str(name).rstrip("/").rpartition("/")[2].lower().replace("_", "-")
    return ALIASES.get(plain, plain)
