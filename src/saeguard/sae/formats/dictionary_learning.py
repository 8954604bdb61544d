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

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import JumpReLU, ReLU, SparseAutoencoder, TopK
from saeguard.sae.formats.place import Place
from saeguard.sae.tensors import read_config, read_tensors

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
Weights = dict[str, Tensor]


def find(place: Place) -> Path | None:
    """`ae.pt` beside a `config.json`."""
    path = place.file("ae.pt")
    return path if path and path.with_name("config.json").is_file() else None


def read(path: Path, source: str) -> SparseAutoencoder:
    """Any of the seven classes."""
    trainer = read_config(path.with_name("config.json")).get("trainer")
    if not isinstance(trainer, dict) or trainer.get("dict_class") not in CLASSES:
        found = trainer.get("dict_class") if isinstance(trainer, dict) else None
        raise SAEError.mismatch(
            f"trainer.dict_class of {source}", found=found, expected=sorted(CLASSES), fix="Choose another SAE."
        )
    keys, build = CLASSES[trainer["dict_class"]]
    name = str(trainer.get("submodule_name") or "")
    metadata = {
        "layer": trainer.get("layer"), "model_name": trainer.get("lm_name"), "hook_name": name,
        "hook": "mlp_out" if "mlp" in name else "attn_out" if "att" in name else "resid_post",
    }  # fmt: skip
    return SparseAutoencoder(**build(read_tensors(path, keys)), source=source, metadata=metadata)


def _linear(weights: Weights, b_dec: Tensor, *, pre_bias: bool) -> dict[str, Any]:
    return _folded(
        weights["encoder.weight"].T.contiguous(), weights["encoder.bias"], weights["decoder.weight"].T.contiguous(),
        b_dec, pre_bias=pre_bias,
    )  # fmt: skip


def _folded(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, *, pre_bias: bool) -> dict[str, Any]:
    return {"W_enc": W_enc, "b_enc": b_enc - b_dec @ W_enc if pre_bias else b_enc, "W_dec": W_dec, "b_dec": b_dec}


def _standard(weights: Weights) -> dict[str, Any]:
    return _linear(weights, weights["bias"], pre_bias=True) | {"activation": ReLU()}


def _new(weights: Weights) -> dict[str, Any]:
    return _linear(weights, weights["decoder.bias"], pre_bias=False) | {"activation": ReLU()}


def _gated(weights: Weights) -> dict[str, Any]:
    """A gate is a threshold on the magnitude, since both are affine in one projection.

    With x = (h - b) W: on where x + gate_bias > 0, magnitude exp(r) x + mag_bias, so on where the magnitude is above
    mag_bias - exp(r) gate_bias.
    """
    scale = weights["r_mag"].exp()
    found = _folded(
        weights["encoder.weight"].T.contiguous() * scale, weights["mag_bias"],
        weights["decoder.weight"].T.contiguous(), weights["decoder_bias"], pre_bias=True,
    )  # fmt: skip
    return found | {"activation": JumpReLU(weights["mag_bias"] - scale * weights["gate_bias"])}


def _jumprelu(weights: Weights) -> dict[str, Any]:
    return {name: weights[name] for name in PLAIN} | {"activation": JumpReLU(weights["threshold"])}


def _topk(weights: Weights) -> dict[str, Any]:
    return _linear(weights, weights["b_dec"], pre_bias=True) | {"activation": TopK(int(weights["k"]))}


def _batch_topk(weights: Weights) -> dict[str, Any]:
    found = _linear(weights, weights["b_dec"], pre_bias=True)
    return found | {"activation": JumpReLU(weights["threshold"].expand(len(found["b_enc"])).contiguous())}


def _matryoshka(weights: Weights) -> dict[str, Any]:
    found = _folded(*(weights[name] for name in PLAIN), pre_bias=True)
    return found | {"activation": JumpReLU(weights["threshold"].expand(len(found["b_enc"])).contiguous())}


CLASSES: dict[str, tuple[tuple[str, ...], Callable[[Weights], dict[str, Any]]]] = {
    "AutoEncoder": ((*LINEAR, "bias"), _standard),
    "AutoEncoderNew": ((*LINEAR, "decoder.bias"), _new),
    "GatedAutoEncoder": (
        ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
        _gated,
    ),
    "JumpReluAutoEncoder": ((*PLAIN, "threshold"), _jumprelu),
    "AutoEncoderTopK": ((*LINEAR, "b_dec", "k"), _topk),
    "BatchTopKSAE": ((*LINEAR, "b_dec", "threshold"), _batch_topk),
    "MatryoshkaBatchTopKSAE": ((*PLAIN, "threshold"), _matryoshka),
}
