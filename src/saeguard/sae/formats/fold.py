"""Folding what a family does beside the plain formula into an SAE's weights, so that it is in plain units.

The SAE is built from the stored tensors first, which checks their shapes. Large weights are then changed in place,
which neither copies them nor touches the file they are mapped from.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, SparseAutoencoder

SMALLEST_NORM = 1e-8


def input_bias(sae: SparseAutoencoder) -> SparseAutoencoder:
    """What encodes h - b_dec."""
    if sae.d_out != sae.d_model:
        raise SAEError(f"{sae.source} subtracts at its input a b_dec of another width: its configuration is wrong.")
    return replace(sae, b_enc=sae.b_enc - sae.b_dec @ sae.W_enc)


def gate(sae: SparseAutoencoder, r_mag: Tensor) -> SparseAutoencoder:
    """A gated SAE, from one whose `b_enc` is the magnitude's bias and whose threshold is the gate's bias.

    A gate is a threshold on the magnitude, since both are affine in one projection x = h W: on where
    x + gate_bias > 0, magnitude exp(r) x + mag_bias, so on where the magnitude is above mag_bias - exp(r) gate_bias.
    """
    if r_mag.shape != sae.b_enc.shape:
        raise SAEError.mismatch(
            f"r_mag of the SAE {sae.source}", found=tuple(r_mag.shape), expected=tuple(sae.b_enc.shape),
            fix="The file is damaged or of another layout.",
        )  # fmt: skip
    scale = r_mag.exp()
    sae.W_enc.mul_(scale)
    return replace(sae, activation=JumpReLU(sae.b_enc - scale * _threshold(sae)))


def decoder_norms(sae: SparseAutoencoder) -> SparseAutoencoder:
    """What weighs pre-activations by the norms of the decoder rows before its activation, and divides after it.

    Activations come out in units of those norms: the rows are then of unit norm. Thresholds are in these units.
    """
    norm = sae.W_dec.norm(dim=1).clamp(min=SMALLEST_NORM)
    sae.W_enc.mul_(norm)
    sae.W_dec.div_(norm[:, None])
    return replace(sae, b_enc=sae.b_enc * norm)


def input_scale(sae: SparseAutoencoder, into: float, out: float) -> SparseAutoencoder:
    """What encodes `into` h, and gives `out` times what it reconstructs. Thresholds are in units of the scaled input.

    Activations come out in units of h. ReLU, JumpReLU and TopK of s x are s times those of x, so that W_enc stays.
    """
    if into != out:
        sae.W_dec.mul_(into / out)
    folded = replace(sae, b_enc=sae.b_enc / into, b_dec=sae.b_dec / out)
    if isinstance(sae.activation, JumpReLU):
        return replace(folded, activation=JumpReLU(_threshold(sae) / into))
    return folded


def _threshold(sae: SparseAutoencoder) -> Tensor:
    assert isinstance(sae.activation, JumpReLU)
    return sae.activation.threshold
