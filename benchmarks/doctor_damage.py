"""The doctor on the embedded SAE, intact and damaged in each way that is common, and on the wrong layers.

    python benchmarks/doctor_damage.py [--dtype float32] [--only unfolded]

The SAE's metadata is taken away first, so that nothing but the figures speaks. Prints the table of docs/doctor.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from saeguard.corpus import Corpus
from saeguard.doctor.diagnosis import FIT_TOKENS, diagnose
from saeguard.doctor.reading import Subject
from saeguard.embedded import LAYER, embedded_model, embedded_sae, starter_set
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder

LAYERS = (2, 5, 7, 9, 20)
FACTORS = (0.241, 0.5, 1.5, 4.0)


def damaged(sae: SparseAutoencoder) -> Iterator[tuple[str, SparseAutoencoder, int]]:
    """Name, SAE and layer of each case. 0.241 is sqrt(d_model) over the mean residual norm."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(sae.d_sae, generator=generator)
    turn = torch.linalg.qr(torch.randn(sae.d_model, sae.d_model, generator=generator))[0]
    threshold, shift = sae.activation.threshold, sae.b_dec @ sae.W_enc
    moved = replace(sae, W_enc=sae.W_enc[:, order], b_enc=sae.b_enc[order], activation=JumpReLU(threshold[order]))
    yield "intact", sae, LAYER
    yield "b_dec no longer subtracted", replace(sae, b_enc=sae.b_enc + shift), LAYER
    yield "b_dec subtracted needlessly", replace(sae, b_enc=sae.b_enc - shift), LAYER
    yield "W_enc shuffled", replace(sae, W_enc=sae.W_enc[:, order]), LAYER
    yield "encoder shuffled", moved, LAYER
    yield (
        "other coordinates",
        replace(sae, W_enc=turn.T @ sae.W_enc, W_dec=sae.W_dec @ turn, b_dec=sae.b_dec @ turn),
        LAYER,
    )
    for k in FACTORS:
        scaled = replace(sae, b_enc=sae.b_enc * k, b_dec=sae.b_dec * k, activation=JumpReLU(threshold * k))
        yield f"unfolded, {k:g}", scaled, LAYER
    for layer in LAYERS:
        yield f"layer {layer}", sae, layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    args = parser.parse_args()
    model, tokenizer = embedded_model(dtype=args.dtype)
    texts = [Corpus.of(name, "retain", path) for name, path in starter_set().retain.items()]
    sys.stdout.write("| SAE | explained | ordinary | L0 | scaled | b_dec | layer | verdict |\n|" + "---|" * 8 + "\n")
    for name, sae, layer in damaged(replace(embedded_sae(), metadata={})):
        if args.only not in name:
            continue
        found = diagnose(Subject(model, tokenizer, sae, layer), texts, tokens=FIT_TOKENS, thorough=False)
        whole, tried = found.figures.whole, found.figures.corrections
        causes = ", ".join(finding.what for finding in found.findings if finding.level == "mismatch")
        best = f"{tried.layer.explained_variance:.2f} at {tried.layer.value:g}"
        sys.stdout.write(
            f"| {name} | {whole.explained_variance:.2f} | {whole.ordinary:.2f} | {whole.l0:.0f} "
            f"| {tried.scale.explained_variance:.2f} at {tried.scale.value:.3g} | {tried.b_dec.explained_variance:.2f} "
            f"| {best} | {found.verdict}{f': {causes}' if causes else ''} |\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
