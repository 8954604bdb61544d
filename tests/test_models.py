"""Models as people run them: wrapped, compiled, split over devices, in half precision, inside a multimodal model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from conftest import make_guardrail, make_model, make_sae
from saeguard.errors import ArtifactMismatchError
from saeguard.guardrail import Guardrail
from saeguard.model import decoder_layers, entrances, input_device, load_model, model_fingerprint, residual_stream
from tiny import generate, hooks_on, prompts, same_verdicts

ROW = prompts(12)[0]
TEXT = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def always(model: PreTrainedModel, tokenizer: Any) -> Guardrail:
    """A guardrail that triggers on any text."""
    return make_guardrail(model, tokenizer, make_sae("jumprelu"), 1, threshold=-1.0)


def logits(model: nn.Module, row: Tensor = ROW) -> Tensor:
    with torch.no_grad():
        return model(input_ids=row).logits


PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def adapted() -> Any:
    """The tiny Llama inside PEFT, with an adapter that does something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(make_model("llama"), config).eval()


@PEFT
def test_a_model_with_an_adapter_is_guarded_however_it_is_called(adapted: Any, tokenizer: Any) -> None:
    guardrail, inner = always(adapted, tokenizer), adapted.get_base_model()
    unguarded = logits(adapted)
    with guardrail.attach(adapted, tokenizer) as guard:
        guarded = logits(adapted)
        verdict = guard.verdicts[0]
        assert verdict.triggered
        assert torch.equal(logits(inner), guarded)
        same_verdicts(guard.verdicts, [verdict])
        cached = generate(adapted, ROW)
        assert torch.equal(generate(adapted, ROW, use_cache=False), cached)
        assert torch.equal(generate(inner, ROW), cached)
        assert torch.equal(cached[:, 12], guarded[:, -1].argmax(dim=-1))
    assert not torch.allclose(guarded, unguarded)
    assert torch.equal(logits(adapted), unguarded)
    assert hooks_on(adapted) == 0


@PEFT
def test_another_adapter_is_another_model(adapted: Any, tokenizer: Any) -> None:
    guardrail = always(adapted, tokenizer)
    with pytest.raises(ArtifactMismatchError, match="weights of the model"):
        guardrail.check(make_model("llama"), tokenizer)
    with torch.no_grad():
        adapted.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight").mul_(2)
    with pytest.raises(ArtifactMismatchError, match="weights of the model"):
        guardrail.check(adapted, tokenizer)


def test_a_compiled_model_is_the_model(llama: PreTrainedModel, tokenizer: Any) -> None:
    compiled: Any = torch.compile(llama, backend="eager")
    guardrail = always(llama, tokenizer)
    expected = logits(compiled)
    with guardrail.attach(compiled, tokenizer) as guard:
        guarded = logits(compiled)
        assert torch.equal(logits(llama), guarded)
        assert torch.equal(generate(compiled, ROW), generate(llama, ROW, use_cache=False))
        assert guard.verdicts[0].triggered
    assert not torch.allclose(guarded, expected)
    assert torch.equal(logits(compiled), expected)


def test_layers_compiled_one_by_one_are_guarded(tokenizer: Any) -> None:
    llama, plain = make_model("llama"), make_model("llama")
    for layer in decoder_layers(llama):
        layer.compile(backend="eager")
    logits(llama)
    guardrail = always(plain, tokenizer)
    with guardrail.attach(plain, tokenizer):
        expected = logits(plain)
    with guardrail.attach(llama, tokenizer) as guard:
        torch.testing.assert_close(logits(llama), expected)
        assert guard.verdicts[0].triggered


SPLITS = {
    "cpu": lambda model, folder: cpu_offload(model),
    "disk": lambda model, folder: disk_offload(model, folder),
    "both": lambda model, folder: dispatch_model(
        model, {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu",
                "model.layers.3": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"},
        main_device="cpu", offload_dir=folder,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # transformers 4.57, of offloaded models
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_a_model_spread_over_devices_is_the_model(split: str, tie: bool, tokenizer: Any, tmp_path: Path) -> None:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=tie)).eval()

    whole = build()
    spread = SPLITS[split](build(), tmp_path)
    assert model_fingerprint(spread) == model_fingerprint(whole)
    guardrail = always(whole, tokenizer)
    with guardrail.attach(whole, tokenizer):
        expected, text = logits(whole), generate(whole, ROW)
    whole_stream = residual_stream(whole, 2, ROW, torch.ones_like(ROW))
    assert torch.equal(residual_stream(spread, 2, ROW, torch.ones_like(ROW)), whole_stream)
    assert input_device(spread) == torch.device("cpu")
    with guardrail.attach(spread, tokenizer) as guard:
        assert torch.equal(logits(spread), expected)
        assert torch.equal(generate(spread, ROW), text)
        assert guard.verdicts[0].triggered


def test_a_folder_is_loaded_spread_over_all_devices(llama: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    spread, _ = load_model(tmp_path, device="map", dtype="float32")
    assert torch.equal(logits(spread), logits(llama))
    assert model_fingerprint(spread)["weights"] == model_fingerprint(llama)["weights"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_half_precision(family: str, dtype: torch.dtype, tokenizer: Any) -> None:
    model = make_model(family).to(dtype)
    guardrail = always(model, tokenizer)
    expected = logits(model)
    with guardrail.attach(model, tokenizer) as guard:
        guarded = logits(model)
        assert guarded.dtype == dtype
        assert guard.verdicts[0].triggered
        assert torch.equal(generate(model, ROW), generate(model, ROW, use_cache=False))
    assert not torch.equal(guarded, expected)


def test_the_text_model_of_a_multimodal_one_is_guarded(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=319, boi_token_index=317,
        eoi_token_index=318,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    guardrail = always(model, tokenizer)
    expected = logits(model)
    with guardrail.attach(model, tokenizer) as guard:
        guarded = logits(model)
        assert guard.verdicts[0].triggered
        assert torch.equal(generate(model, ROW), generate(model, ROW, use_cache=False))
    assert not torch.allclose(guarded, expected)
    assert torch.equal(logits(model), expected)


def test_the_entrances_lead_from_the_model_to_its_layers(llama: PreTrainedModel) -> None:
    assert [type(module).__name__ for module in entrances(llama)] == ["LlamaForCausalLM", "LlamaModel"]
    compiled: Any = torch.compile(llama, backend="eager")
    assert entrances(compiled) == entrances(llama)


def test_a_model_of_ones_own_is_found_by_its_structure(tokenizer: Any) -> None:
    """A class that transformers does not have: blocks under another name, in a decoder of its own."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.linear(x)).cumsum(dim=1)

    class OwnModel(transformers.LlamaPreTrainedModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
            self.stack = nn.Sequential()
            self.stack.blocks = nn.ModuleList(Block() for _ in range(config.num_hidden_layers))
            self.head = nn.Linear(config.hidden_size, config.vocab_size)
            self.post_init()

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
            x = self.wte(input_ids)
            for block in self.stack.blocks:
                x = block(x)
            return transformers.modeling_outputs.CausalLMOutput(logits=self.head(x))

    torch.manual_seed(0)
    model = OwnModel(transformers.LlamaConfig(**TEXT, tie_word_embeddings=False)).eval()
    assert len(decoder_layers(model)) == 4
    assert residual_stream(model, 1, ROW, torch.ones_like(ROW)).shape == (1, 12, 32)
    expected = logits(model)
    with always(model, tokenizer).attach(model, tokenizer) as guard:
        assert not torch.allclose(logits(model), expected)
        assert guard.verdicts[0].triggered
    assert torch.equal(logits(model), expected)
