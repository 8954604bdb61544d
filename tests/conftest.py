"""What the tests share: random tiny models, a tiny tokenizer, random SAEs and guardrails made by hand.

Everything is built in memory from fixed seeds: no test reads the network or a downloaded file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from saeguard.clamp import Clamp
from saeguard.gate import Density, Gate
from saeguard.guardrail import Guardrail
from saeguard.model import model_fingerprint, tokenizer_fingerprint
from saeguard.rule import Rule
from saeguard.sae.autoencoder import Activation, JumpReLU, ReLU, SparseAutoencoder, TopK
from saeguard.sae.slim import slim
from saeguard.selection import SelectedFeature

settings.register_profile("fast", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("fast")

VOCABULARY, D_MODEL, LAYERS, D_SAE = 320, 32, 4, 64
FAMILIES = ("llama", "gemma", "gpt2")
ACTIVATIONS = ("relu", "jumprelu", "topk")
SENTENCES = (
    "The planets move around the sun in slow and steady orbits, and their moons move around them.",
    "A telescope gathers the faint light of distant stars and galaxies.",
    "Knead the dough for ten minutes, let it rise, and bake it in a hot oven.",
    "The court heard both sides and the judge gave her ruling before noon.",
    "Rivers carry sand and clay to the sea, where they settle in layers.",
    "She scored twice in the second half and the crowd sang until the end.",
    "What is the name of the largest river? Which of these is a planet?",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(*, bos: bool = True, eos: bool = False, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens; `bos` and `eos` say what it puts around a text of its own accord."""
    special = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    template = f"{'<bos> ' if bos else ''}$A{' <eos>' if eos else ''}"
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, special.index(token)) for token in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=special[3:], chat_template=CHAT_TEMPLATE if chat else None,
    )  # fmt: skip


def make_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A random causal LM: 4 layers, hidden size 32, float32, evaluation mode."""
    torch.manual_seed(seed)
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {
        "hidden_size": D_MODEL, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "initializer_range": 0.3,
    }  # fmt: skip
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape | {"initializer_range": 0.2}, **tokens)).eval()
    if family == "gemma":
        attention = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2), "sliding_window": 8}
        return Gemma3ForCausalLM(Gemma3TextConfig(**shape, **tokens, **attention, query_pre_attn_scalar=8)).eval()
    config = GPT2Config(n_embd=D_MODEL, n_layer=LAYERS, n_head=4, n_positions=1024, initializer_range=0.3, **tokens)
    return GPT2LMHeadModel(config).eval()


def make_sae(activation: str, *, seed: int = 0, d_model: int = D_MODEL, d_sae: int = D_SAE) -> SparseAutoencoder:
    """A random SAE: about one feature in six is active on the tiny models' residual streams (norms 10 to 50)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    kinds: dict[str, Callable[[], Activation]] = {
        "relu": ReLU,
        "jumprelu": lambda: JumpReLU(0.5 + torch.rand(d_sae, generator=generator)),
        "topk": lambda: TopK(10),
    }
    directions = random(d_sae, d_model)
    decoder = directions / directions.norm(dim=1, keepdim=True)
    return SparseAutoencoder(
        W_enc=(decoder.T + 0.1 * random(d_model, d_sae)).contiguous(), b_enc=random(d_sae) - 4.0,
        W_dec=decoder, b_dec=0.1 * random(d_model), activation=kinds[activation](), source=f"random {activation}",
    )  # fmt: skip


def make_guardrail(
    model: PreTrainedModel, tokenizer: Any, sae: SparseAutoencoder, layer: int,
    *, features: Sequence[int] = (3, 7, 11, 19, 23, 42), **changes: Any,
) -> Guardrail:  # fmt: skip
    """A guardrail without fitting: a running density gate with threshold 0.5 on some features, and a dense clamp of 5.

    `changes` are fields of the rule: `gate`, `threshold`, `clamp`, `action`, `name`, `evidence`, `encoder`.
    """
    ids = list(features)
    rule = Rule(
        name="topic",
        selected=tuple(SelectedFeature(j, 1.0 + j, 0.5, 2.0 + 2 * j, {"forget": 0.5, "wiki": 0.25}) for j in ids),
        encoder=slim(sae, ids),
        decoder=sae.W_dec[ids].contiguous(),
        gate=Gate(Density()),
        threshold=0.5,
        clamp=Clamp("dense", c=5.0, strength=1.0),
        evidence={"median_residual_norm": 5.0, "note": "made by hand, not fitted — naïve"},
    )
    return Guardrail(
        layer=layer,
        hook=sae.hook,
        hook_out=sae.hook_out,
        model=model_fingerprint(model),
        tokenizer=tokenizer_fingerprint(tokenizer),
        sae={
            "source": sae.source,
            "fingerprint": sae.fingerprint(),
            "activation": type(sae.activation).__name__,
            "d_sae": sae.d_sae,
        },
        rules=(replace(rule, **changes),),
        versions={"saeguard": "test"},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same, whichever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with BOS and a chat template. Do not change it: it is shared."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """The tiny Llama. Do not change it: it is shared."""
    return make_model("llama")


@pytest.fixture(scope="session", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each tiny model in turn. Do not change it: it is shared."""
    return make_model(request.param)


@pytest.fixture(scope="session", params=ACTIVATIONS)
def sae(request: pytest.FixtureRequest) -> SparseAutoencoder:
    """Each kind of random SAE in turn."""
    return make_sae(request.param)


@pytest.fixture(scope="session")
def guardrail(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Guardrail:
    """A guardrail of a JumpReLU SAE on layer 2 of the tiny Llama."""
    return make_guardrail(llama, tokenizer, make_sae("jumprelu"), 2)
