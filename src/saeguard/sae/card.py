"""The card of a trained SAE."""

from __future__ import annotations

from collections.abc import Sequence

from saeguard.config import SAETraining
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.sae.quality import SAEQuality


def sae_card(
    sae: SparseAutoencoder, config: SAETraining, quality: SAEQuality, texts: Sequence[str], tokens: int
) -> str:
    """A README for the SAE's folder."""
    return f"""# Sparse autoencoder, layer {sae.layer} of {sae.metadata.get("model_name")}

JumpReLU, {sae.d_sae:,} features on a residual stream of width {sae.d_model}, in SAELens format, decoder rows of unit
norm, no input scaling. Trained with `saeguard train-sae` (BatchTopK with a tracked threshold, k = {config.k}) for
{config.token_passes:,} token passes over about {tokens:,} tokens.

Trained on (the `fit` half of the documents of each): {", ".join(texts)}.

On {quality.tokens:,} held-out tokens of the same corpora:

| explained variance | median of the dimensions' | L0 | dead features | loss clean | loss with SAE | \
loss without layer | loss recovered |
|---|---|---|---|---|---|---|---|
| {quality.explained_variance:.3f} | {quality.explained_variance_median:.3f} | {quality.l0:.1f} | \
{quality.dead_share:.2%} | {quality.loss_clean:.3f} | {quality.loss_spliced:.3f} | {quality.loss_zero:.3f} | \
{quality.loss_recovered:.3f} |
"""
