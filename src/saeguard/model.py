"""What this package knows of Hugging Face models: their layers, their tokenizer, their identity.

The decoder layers are found by structure, not by a list of model names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from saeguard.errors import LayerError, ModelError
from saeguard.hookpoints import HookPoint, port_in, width_at
from saeguard.hooks import Change, Port, at
from saeguard.tokens import special_token_ids


def load_model(source: str | Path, *, device: str = "auto", dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """A causal LM in evaluation mode, and its tokenizer, from a hub id or a folder. Raises `ModelError`.

    The device `map` spreads the model over all devices there are (accelerate's `device_map="auto"`).
    """
    spread = {"device_map": "auto"} if device == "map" else {}
    device = pick_device("auto" if spread else device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=pick_dtype(dtype, device), **spread)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"cannot load the model {source}: {error}") from error
    placed = bool(spread) or getattr(model, "is_quantized", False)
    return (model if placed else model.to(device)).eval(), tokenizer


def empty_model(source: str | Path) -> PreTrainedModel:
    """A causal LM without its weights, for its shapes: nothing is read but the configuration. Raises `ModelError`."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"cannot read the configuration of the model {source}: {error}") from error
    return model


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


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go in: the device on which the embedding runs, also of a model that accelerate spreads."""
    embedding: Any = _base(model).get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else torch.device(device)


def text_config(model: nn.Module) -> Any:
    """The config of the language model, also inside a multimodal wrapper."""
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} has no `config`: it is not a Hugging Face model")
    return config.get_text_config(decoder=True)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks: of all module lists of the configured length in the decoder, the outermost one."""
    count = getattr(text_config(model), "num_hidden_layers", None)
    decoder: nn.Module = _base(model).get_decoder()  # type: ignore[no-untyped-call]
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


def layer_device(model: nn.Module, layer: int) -> torch.device:
    """Where the values of a decoder block are, also of a model that accelerate spreads."""
    block: Any = decoder_layer(model, layer)
    device = getattr(getattr(block, "_hf_hook", None), "execution_device", None)
    return next(block.parameters()).device if device is None else torch.device(device)


def linear_modules(model: nn.Module, layers: Iterable[int]) -> list[str]:
    """Names of the linear modules of some decoder blocks, transposed ones (GPT-2) too."""
    names = {module: name for name, module in model.named_modules()}
    blocks = decoder_layers(model)
    return [names[part] for layer in layers for part in blocks[layer].modules() if isinstance(part, nn.Linear | Conv1D)]


def entrances(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the decoder blocks, from the Hugging Face model inwards: every pass goes through one.

    Not always the outermost: PEFT calls the `forward` of the model it wraps, past the hooks on it.
    """
    base, layers = _base(model), decoder_layers(model)
    path = next(name for name, module in base.named_modules() if module is layers).split(".")
    return [base.get_submodule(".".join(path[:depth])) for depth in range(len(path))]


def port_at(model: nn.Module, point: HookPoint) -> Port:
    """Where the values of a hook point pass. Raises `LayerError` or `HookError`."""
    return port_in(decoder_layer(model, point.layer), point.hook)


def embedding_port(model: nn.Module) -> Port:
    """Where the embeddings of the tokens come out."""
    return Port(_base(model).get_input_embeddings(), "output")


def width_of(model: nn.Module, point: HookPoint) -> int:
    """The last dimension of the values at a hook point."""
    return width_at(port_at(model, point), text_config(model).hidden_size)


class _Enough(Exception):
    """Ends a forward pass once the last layer asked for has run."""


def run_to(model: nn.Module, layer: int, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Run a model up to and with block `layer`, for what hooks see there. No later block is run.

    With gradients where those are on.
    """

    def stop(values: Tensor) -> None:
        raise _Enough

    with at(port_at(model, HookPoint(layer)), stop), suppress(_Enough):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


def capture(
    model: nn.Module, points: Sequence[HookPoint], input_ids: Tensor, attention_mask: Tensor
) -> dict[HookPoint, Tensor]:
    """The values (batch, tokens, d) at some hook points. No block after the last one asked for is run."""
    with torch.inference_mode():
        return passing(model, points, input_ids, attention_mask)


def passing(
    model: nn.Module, points: Sequence[HookPoint], input_ids: Tensor, attention_mask: Tensor
) -> dict[HookPoint, Tensor]:
    """As `capture`, with gradients where those are on."""
    found: dict[HookPoint, Tensor] = {}

    def keep(point: HookPoint) -> Change:
        def see(values: Tensor) -> None:
            # A copy: some blocks add to what their parts return in place.
            found[point] = values.clone()

        return see

    with ExitStack() as stack:
        for point in points:
            stack.enter_context(at(port_at(model, point), keep(point)))
        run_to(model, max(point.layer for point in points), input_ids, attention_mask)
    if missing := [str(point) for point in points if point not in found]:
        raise ModelError(f"{type(model).__name__} ran without passing {', '.join(missing)}")
    # Only now: some blocks flatten batch and tokens, and a guard may first read other sequences in the same pass.
    return {point: values.reshape(*input_ids.shape, -1) for point, values in found.items()}


def residual_streams(
    model: nn.Module, layers: Sequence[int], input_ids: Tensor, attention_mask: Tensor
) -> dict[int, Tensor]:
    """Residual stream (batch, tokens, d_model) after each of some blocks."""
    found = capture(model, [HookPoint(layer) for layer in layers], input_ids, attention_mask)
    return {point.layer: values for point, values in found.items()}


def residual_stream(model: nn.Module, layer: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Residual stream (batch, tokens, d_model) after block `layer`. No later block is run."""
    return residual_streams(model, [layer], input_ids, attention_mask)[layer]


def values_of_embeddings(model: nn.Module, point: HookPoint, embeddings: Tensor) -> Tensor:
    """The values (batch, tokens, d) at a hook point for embedded tokens, through which gradients flow."""
    found: list[Tensor] = []

    def keep(values: Tensor) -> None:
        found.append(values)
        raise _Enough

    with at(port_at(model, point), keep), suppress(_Enough):
        model(inputs_embeds=embeddings, use_cache=False)
    return found[0].reshape(*embeddings.shape[:2], -1)


def unembed(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (..., vocabulary) of a residual stream after any block: through the model's last norm and its head.

    A cap that the model puts on its logits is left out; it changes no order.
    """
    norms = [module for module in entrances(model)[-1].children() if "norm" in type(module).__name__.lower()]
    head = _base(model).get_output_embeddings()  # type: ignore[no-untyped-call]
    if not norms or head is None:
        raise ModelError(f"{type(model).__name__} has no norm after its blocks, or no head: nothing can be read out")
    logits: Tensor = head(norms[-1](hidden))
    return logits


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Identity of a model: its name, and a hash of its text config and of a sample of its weights.

    The sample is 64 values spread over each parameter, rounded to bfloat16, so that it does not depend on the device
    or on float32 against bfloat16. A compiled model is the model; one with adapters is another, quantised ones too.
    """
    config = text_config(model)
    shape = {
        name: getattr(config, name, None)
        for name in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    digest = hashlib.sha256()
    for name, values in sorted(_weight_samples(_base(model)).items()):
        digest.update(name.encode() + values.numpy().tobytes())
    return {"name": getattr(config, "_name_or_path", ""), "config": shape, "weights": digest.hexdigest()[:16]}


def _weight_samples(base: nn.Module) -> dict[str, Tensor]:
    """64 values of each parameter by name, those of parameters that accelerate has offloaded too, tied ones once."""
    tied = base.get_output_embeddings() if getattr(text_config(base), "tie_word_embeddings", False) else None  # type: ignore[operator]
    samples: dict[str, Tensor] = {}
    for prefix, module in base.named_modules():
        if module is tied:
            continue
        with align_module_device(module):
            for name, parameter in module.named_parameters(prefix, recurse=False):
                flat = parameter.detach().flatten()
                picked = flat[torch.arange(64, device=flat.device) * (flat.numel() - 1) // 63]
                samples[name] = picked.to(torch.bfloat16).float().cpu()
    return samples


def _base(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside wrappers. Raises `ModelError`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ModelError(f"there is no Hugging Face model in {type(model).__name__}")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of the vocabulary, the special tokens and the chat template."""
    parts = [sorted(tokenizer.get_vocab().items()), special_token_ids(tokenizer), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
