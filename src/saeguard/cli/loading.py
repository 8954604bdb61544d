"""From the options of a command to model, tokenizer and SAE."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from saeguard.embedded import LAYER, SAE_SOURCE, embedded_model, embedded_sae
from saeguard.errors import UsageError
from saeguard.guardrail import Guardrail
from saeguard.model import load_model
from saeguard.sae.autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer; `embedded` if they are the package's own default."""

    model: Any
    tokenizer: Any
    embedded: bool

    def sae_and_layer(self, sae: str | None, layer: int | None) -> tuple[SparseAutoencoder, int]:
        """The SAE asked for and the layer it guards. Raises `UsageError` where one cannot be known."""
        return sae_and_layer(sae, layer, embedded=self.embedded)


def sae_and_layer(sae: str | None, layer: int | None, *, embedded: bool) -> tuple[SparseAutoencoder, int]:
    """The SAE asked for and the layer it guards; `embedded`: in the embedded model. Raises `UsageError`."""
    if sae is None and not embedded:
        raise UsageError("--sae is needed with --model: the embedded SAE belongs to the embedded model")
    found = embedded_sae() if sae is None else SparseAutoencoder.load(sae)
    layer = layer if layer is not None else (LAYER if sae is None else found.layer)
    if layer is None:
        raise UsageError(f"--layer is needed: the SAE {sae} does not say which layer it was trained on")
    return found, layer


def sae_of(guardrail: Guardrail, source: str | None = None) -> SparseAutoencoder:
    """The SAE of a source, by default the one that a guardrail was fitted with."""
    source = source or guardrail.sae["source"]
    return embedded_sae() if source == SAE_SOURCE else SparseAutoencoder.load(source)


def load(args: argparse.Namespace) -> Loaded:
    """The model that the options name, with the seed set."""
    import torch

    torch.manual_seed(args.seed)
    if args.model is None:
        return Loaded(*embedded_model(device=args.device, dtype=args.dtype), embedded=True)
    return Loaded(*load_model(args.model, device=args.device, dtype=args.dtype), embedded=False)


def model_of(args: argparse.Namespace) -> tuple[Any, Any]:
    """That model and its tokenizer alone."""
    loaded = load(args)
    return loaded.model, loaded.tokenizer
