"""Decoder layers by structure, passes that stop early, fingerprints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import LAYERS, make_model, make_tokenizer
from saeguard.errors import LayerError, ModelError
from saeguard.model import (
    decoder_layer,
    decoder_layers,
    load_model,
    model_fingerprint,
    pick_device,
    pick_dtype,
    residual_stream,
    residual_streams,
    tokenizer_fingerprint,
)

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "Llama": {"intermediate_size": 16},
    "Gemma2": {"intermediate_size": 16, "head_dim": 8, "num_key_value_heads": 1},
    "Gemma3Text": {"intermediate_size": 16, "head_dim": 8, "num_key_value_heads": 1},
    "GPT2": {},
    "GPTNeoX": {"intermediate_size": 16},
    "OPT": {"ffn_dim": 16, "word_embed_proj_dim": 16},
    "Falcon": {},
    "Mixtral": {"intermediate_size": 16, "num_key_value_heads": 1, "num_local_experts": 3},
    "Qwen3": {"intermediate_size": 16, "head_dim": 8, "num_key_value_heads": 1},
}


def small(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **SMALL, **CONFIGS[name], pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_found_and_give_the_residual_stream(name: str) -> None:
    model = small(name)
    ids = torch.arange(3, 13)[None]
    layers = decoder_layers(model)
    assert len(layers) == 3
    assert type(layers[0]).__name__.lower().startswith(name.lower()[:4])
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        assert torch.equal(residual_stream(model, layer, ids, torch.ones_like(ids)), states[layer + 1])


def test_layers_of_the_text_model_in_a_multimodal_one() -> None:
    text = {**SMALL, **CONFIGS["Gemma3Text"]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config)
    assert type(decoder_layer(model, 0)).__name__ == "Gemma3DecoderLayer"


def test_no_layer_after_the_last_one_asked_for_is_run(model: PreTrainedModel) -> None:
    calls = [0] * LAYERS

    def count(layer: int) -> Any:
        def hook(*_: Any) -> None:
            calls[layer] += 1

        return hook

    handles = [layer.register_forward_hook(count(i)) for i, layer in enumerate(decoder_layers(model))]
    ids = torch.arange(6, 16)[None]
    streams = residual_streams(model, [2, 0], ids, torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    assert calls == [1, 1, 1, 0]
    assert set(streams) == {0, 2}


@pytest.mark.parametrize("layer", [-1, LAYERS, 99])
def test_a_layer_out_of_range_is_refused(model: PreTrainedModel, layer: int) -> None:
    with pytest.raises(LayerError, match=f"found {layer}, expected 0 to {LAYERS - 1}"):
        decoder_layer(model, layer)


def test_models_that_are_not_decoder_only_are_refused() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0
        )
    )
    with pytest.raises(ModelError, match="not a decoder-only model"):
        decoder_layers(t5)
    llama = small("Llama")
    llama.model.layers = nn.ModuleList(list(llama.model.layers)[:2])
    with pytest.raises(ModelError, match="3 blocks"):
        decoder_layers(llama)
    with pytest.raises(ModelError, match="no `config`"):
        decoder_layers(nn.Linear(2, 2))


def test_fingerprints_tell_models_apart_and_not_their_dtype() -> None:
    llama = make_model("llama")
    fingerprint = model_fingerprint(llama)
    assert fingerprint == model_fingerprint(make_model("llama"))
    assert fingerprint["weights"] != model_fingerprint(make_model("llama", seed=1))["weights"]
    assert fingerprint["weights"] == model_fingerprint(llama.to(torch.bfloat16))["weights"]


def test_tokenizer_fingerprints() -> None:
    assert tokenizer_fingerprint(make_tokenizer()) == tokenizer_fingerprint(make_tokenizer())
    assert tokenizer_fingerprint(make_tokenizer()) != tokenizer_fingerprint(make_tokenizer(chat=False))


def test_a_saved_model_is_loaded(tmp_path: Any, llama: PreTrainedModel, tokenizer: Any) -> None:
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, read = load_model(tmp_path, device="cpu", dtype="float32")
    assert not model.training
    assert model_fingerprint(model)["weights"] == model_fingerprint(llama)["weights"]
    assert tokenizer_fingerprint(read) == tokenizer_fingerprint(tokenizer)


def test_a_folder_without_a_model_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(tmp_path)


def test_device_and_dtype_are_what_was_asked_for() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_dtype("float16", "cpu") == torch.float16
    assert pick_dtype("auto", pick_device("cpu")) in {torch.float32, torch.bfloat16}
