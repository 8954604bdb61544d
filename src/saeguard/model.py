"""What this package knows of Hugging Face models: their layers, their tokenizer, their identity.

The decoder layers are found by structure, not by a list of model names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from saeguard.errors import LayerError, ModelError
from saeguard.hooks import AfterModule, hooked
from saeguard.tokens import special_token_ids


def load_model(source: str | Path, *, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """A causal LM in evaluation mode, and its tokenizer, from a hub id or a folder. Raises `ModelError`."""
    device = pick_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=pick_dtype(dtype, device))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the model {source}: {error}") from error
    return model.to(device).eval(), tokenizer


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a hub id or a folder. Raises `ModelError`."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load the tokenizer of {source}: {error}") from error


def pick_device(device: str) -> str:
    """`auto` is the GPU where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes in it, else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def text_config(model: nn.Module) -> Any:
    """The config of the language model, also inside a multimodal wrapper."""
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no `config`: it is not a Hugging Face model")
    return config.get_text_config(decoder=True)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: of all module lists of the configured length in the decoder, the outermost one."""
    count = getattr(text_config(model), "num_hidden_layers", None)
    decoder: nn.Module = model.get_decoder() if isinstance(model, PreTrainedModel) else model  # type: ignore
    candidates = [
        (name.count("."), name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if getattr(model.config, "is_encoder_decoder", False) or not candidates:
        raise ModelError(
            f"{type(model).__name__} is not a decoder-only model with {count} blocks in one list; "
            "expected a causal language model"
        )
    return min(candidates, key=lambda found: found[:2])[2]


def decoder_layer(model: nn.Module, layer: int) -> nn.Module:
    """The decoder block `layer`. Raises `LayerError` where the model has no such block."""
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise LayerError.mismatch(
            f"layer of {type(model).__name__}",
            found=layer,
            expected=f"0 to {len(layers) - 1}",
            fix="Layers count from 0.",
        )
    return layers[layer]


def residual_of(output: Any) -> Tensor:
    """The residual stream (batch, tokens, d_model) in what a decoder block returns."""
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a decoder block returned {type(hidden).__name__}, expected a tensor")
    return hidden


def replace_residual(output: Any, hidden: Tensor) -> Any:
    """What a decoder block returned, with another residual stream in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


class _Enough(Exception):
    """Ends a forward pass once the last layer asked for has run."""


def residual_streams(
    model: nn.Module, layers: Sequence[int], input_ids: Tensor, attention_mask: Tensor
) -> dict[int, Tensor]:
    """Residual stream (batch, tokens, d_model) after each of some blocks. No block after the last is run."""
    streams: dict[int, Tensor] = {}

    def keep(layer: int) -> AfterModule:
        def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            streams[layer] = residual_of(output)
            if layer == max(layers):
                raise _Enough

        return hook

    with torch.inference_mode(), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(hooked(decoder_layer(model, layer), keep(layer)))
        with suppress(_Enough):
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    if len(streams) < len(layers):
        raise ModelError(f"blocks {sorted(set(layers) - streams.keys())} of {type(model).__name__} were never run")
    return streams


def residual_stream(model: nn.Module, layer: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Residual stream (batch, tokens, d_model) after block `layer`. No later block is run."""
    return residual_streams(model, [layer], input_ids, attention_mask)[layer]


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Identity of a model: its name, and a hash of its text config and of a sample of its weights.

    The sample is 64 values spread over each parameter up to the last block, in float32, rounded to 3
    significant digits, so that it does not depend on device or on float32 against bfloat16.
    """
    config = text_config(model)
    shape = {
        name: getattr(config, name, None)
        for name in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        picked = flat[torch.arange(64, device=flat.device) * (flat.numel() - 1) // 63].to(torch.bfloat16)
        digest.update(name.encode() + picked.float().cpu().numpy().tobytes())
    return {"name": getattr(config, "_name_or_path", ""), "config": shape, "weights": digest.hexdigest()[:16]}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary, the special tokens and the chat template."""
    parts = [sorted(tokenizer.get_vocab().items()), special_token_ids(tokenizer), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
