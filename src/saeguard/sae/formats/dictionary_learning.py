"""dictionary_learning: `ae.pt` and `config.json`, seven classes named by `trainer.dict_class`.

    AutoEncoder           relu(enc(h - bias))                           keys bias, encoder.*, decoder.weight
    AutoEncoderNew        relu(enc(h))                                  encoder.*, decoder.*
    GatedAutoEncoder      gate enc(h - decoder_bias), see `_gated`      decoder_bias, r_mag, gate_bias, mag_bias, ...
    JumpReluAutoEncoder   jumprelu(h W_enc + b_enc)                     W_enc, b_enc, W_dec, b_dec, threshold
    AutoEncoderTopK       the k largest of relu(enc(h - b_dec))         encoder.*, decoder.weight, b_dec, k
    BatchTopKSAE          relu(enc(h - b_dec)) > threshold              the same, threshold
    MatryoshkaBatchTopKSAE   the same                                   W_enc, W_dec, b_enc, b_dec, threshold

`encoder.weight` (d_sae, d_model), `decoder.weight` (d_model, d_sae). Input scaling is folded in by its own `save`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import Activation, JumpReLU, ReLU, SparseAutoencoder, TopK
from saeguard.sae.formats import fold
from saeguard.sae.formats.hookname import place
from saeguard.sae.formats.place import Origin, Place
from saeguard.sae.tensors import read_config, read_tensors

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
KEYS: dict[str, tuple[str, ...]] = {
    "AutoEncoder": (*LINEAR, "bias"),
    "AutoEncoderNew": (*LINEAR, "decoder.bias"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "JumpReluAutoEncoder": (*PLAIN, "threshold"),
    "AutoEncoderTopK": (*LINEAR, "b_dec", "k"),
    "BatchTopKSAE": (*LINEAR, "b_dec", "threshold"),
    "MatryoshkaBatchTopKSAE": (*PLAIN, "threshold"),
}
ENCODER_BIAS = ("b_enc", "encoder.bias", "mag_bias")
DECODER_BIAS = ("b_dec", "bias", "decoder.bias", "decoder_bias")
CENTRED = KEYS.keys() - {"AutoEncoderNew", "JumpReluAutoEncoder"}


def find(place: Place) -> Path | None:
    """`ae.pt` beside a `config.json`."""
    path = place.file("ae.pt")
    return path if path and path.with_name("config.json").is_file() else None


def read(path: Path, origin: Origin) -> SparseAutoencoder:
    """Any of the seven classes."""
    trainer = read_config(path.with_name("config.json")).get("trainer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") not in KEYS:
        found = trainer.get("dict_class") if isinstance(trainer, dict) else None
        raise SAEError.mismatch(
            f"trainer.dict_class of {origin.source}", found=found, expected=sorted(KEYS), fix="Choose another SAE."
        )
    name = trainer["dict_class"]
    weights = read_tensors(path, KEYS[name])
    linear = "encoder.weight" in weights
    sae = SparseAutoencoder(
        W_enc=weights["encoder.weight"].T if linear else weights["W_enc"], b_enc=_first(weights, ENCODER_BIAS),
        W_dec=weights["decoder.weight"].T if linear else weights["W_dec"], b_dec=_first(weights, DECODER_BIAS),
        activation=_activation(weights), source=origin.source, metadata=_metadata(trainer),
    )  # fmt: skip
    if "r_mag" in weights:
        sae = fold.gate(sae, weights["r_mag"])
    return fold.input_bias(sae) if name in CENTRED else sae


def _first(weights: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return next(weights[name] for name in names if name in weights)


def _activation(weights: dict[str, Tensor]) -> Activation:
    """Of gated SAEs the gate's bias stands for the threshold, until it is folded."""
    if "k" in weights:
        return TopK(int(weights["k"]))
    threshold = weights.get("threshold", weights.get("gate_bias"))
    if threshold is None:
        return ReLU()
    one_for_all = threshold.dim() == 0
    return JumpReLU(threshold.expand(_first(weights, ENCODER_BIAS).shape).contiguous() if one_for_all else threshold)


def _metadata(trainer: dict[str, Any]) -> dict[str, Any]:
    """Where no submodule is named, their trainer reads the residual stream after the layer."""
    model, name = str(trainer.get("lm_name") or ""), str(trainer.get("submodule_name") or "")
    metadata = {"layer": trainer.get("layer"), "model_name": trainer.get("lm_name")}
    return metadata | (place(name, model=model) if name else {})
