"""The places in a block, in every family: what they are said to be is what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from conftest import make_guardrail, make_sae
from saeguard.choices import Hook
from saeguard.errors import HookError
from saeguard.guardrail import Guardrail
from saeguard.hookpoints import HookPoint, port_in
from saeguard.hooks import Port
from saeguard.model import capture, decoder_layer, port_at, width_of
from saeguard.sae.autoencoder import SparseAutoencoder
from tiny import generate, padded, prompts, same_verdicts

SMALL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
KV = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": KV, "Mistral": KV, "Qwen2": KV, "Qwen3": KV, "Gemma2": KV, "Gemma3Text": KV, "Olmo": KV, "Olmo2": KV,
    "Phi3": KV, "Mixtral": KV | {"num_local_experts": 3}, "GPT2": {}, "GPTNeoX": {"intermediate_size": 48}, "Phi": KV,
    "Qwen3Moe": KV | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Falcon": {}, "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "Glm4": KV,
}  # fmt: skip
HOOKS: tuple[Hook, ...] = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
LAYER = 1


def small(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **FAMILIES[name], bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config).eval()


def values(model: PreTrainedModel, *hooks: Hook) -> list[Tensor]:
    """At these places of block `LAYER`, on two padded rows."""
    batch = padded(prompts(9, 6), "right")
    found = capture(model, [HookPoint(LAYER, hook) for hook in hooks], batch["input_ids"], batch["attention_mask"])
    return [found[HookPoint(LAYER, hook)] for hook in hooks]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_of_a_block_add_up(name: str) -> None:
    before, attention, mlp, after = values(small(name), "resid_pre", "attn_out", "mlp_out", "resid_post")
    torch.testing.assert_close(before + attention + mlp, after, rtol=1e-4, atol=1e-4)
    assert min(attention.abs().amax(), mlp.abs().amax()) > 1e-3


def after_norm(part: nn.Module, out: nn.Module, result: Any) -> Tensor:
    """What a part returned, through the norm that follows it where one does."""
    result = result[0] if isinstance(result, tuple) else result
    return out(result) if "Norm" in type(out).__name__ else result


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "OPT"])
def test_one_place_is_computed_from_another(name: str) -> None:
    model = small(name)
    block = decoder_layer(model, LAYER)
    heads, attention, mlp_in, mlp_out = values(model, "attn_z", "attn_out", "mlp_in", "mlp_out")
    with torch.inference_mode():
        for read, out, inside, expected in (
            ("attn_z", "attn_out", heads, attention),
            ("mlp_in", "mlp_out", mlp_in, mlp_out),
        ):
            part = port_in(block, read).module
            torch.testing.assert_close(after_norm(part, port_in(block, out).module, part(inside)), expected)
    assert heads.shape[-1] == width_of(model, HookPoint(LAYER, "attn_z"))


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2", "Olmo2", "OPT"])
def test_between_attention_and_mlp(name: str) -> None:
    before, attention, between = values(small(name), "resid_pre", "attn_out", "resid_mid")
    torch.testing.assert_close(before + attention, between, rtol=1e-4, atol=1e-4)


def test_a_block_whose_parts_add_the_stream_themselves_is_refused() -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    bloom = AutoModelForCausalLM.from_config(config)
    assert port_at(bloom, HookPoint(0)).side == "output"
    with pytest.raises(HookError, match="adds the residual stream itself"):
        port_at(bloom, HookPoint(0, "mlp_out"))
    with pytest.raises(HookError, match="found \\['0'\\], expected one of"):
        port_in(nn.Sequential(nn.Linear(2, 2)), "attn_out")


def site_sae(model: PreTrainedModel, hook: Hook, hook_out: Hook | None = None, layer: int = LAYER) -> SparseAutoencoder:
    """A random SAE of a place, scaled so that about a quarter of its features are active there."""
    d_in, d_out = (width_of(model, HookPoint(layer, place)) for place in (hook, hook_out or hook))
    sae, out = make_sae("jumprelu", d_model=d_in), make_sae("jumprelu", d_model=d_out)
    size = float(values(model, hook)[0].norm(dim=-1).median()) / 20
    metadata = {"hook": hook} | ({"hook_out": hook_out} if hook_out else {})
    return replace(sae, W_enc=sae.W_enc / size, W_dec=out.W_dec, b_dec=out.b_dec, metadata=metadata)


def site_guardrail(model: PreTrainedModel, tokenizer: Any, sae: SparseAutoencoder, threshold: float) -> Guardrail:
    """A guardrail on the six features that are active most often there."""
    often = (sae.encode(values(model, sae.hook)[0]) > 0).float().mean(dim=(0, 1))
    features = often.topk(6).indices.tolist()
    return make_guardrail(model, tokenizer, sae, LAYER, features=features, threshold=threshold)


def listen(port: Port, change: Any) -> Any:
    """A hook of the tests' own on a port."""

    def after(_module: Any, _args: Any, output: Any) -> Any:
        new = change(output[0] if isinstance(output, tuple) else output)
        return new if new is None or not isinstance(output, tuple) else (new, *output[1:])

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        name = None if args else next(iter(kwargs))
        new = change(kwargs[name] if name else args[0])
        if new is None:
            return None
        return (args, kwargs | {name: new}) if name else ((new, *args[1:]), kwargs)

    if port.side == "output":
        return port.module.register_forward_hook(after)
    return port.module.register_forward_pre_hook(before, with_kwargs=True)


def full_logits(model: PreTrainedModel, sae: SparseAutoencoder, guardrail: Guardrail, row: Tensor) -> Tensor:
    """Every token clamped where a feature fires, by the whole SAE."""
    ids, seen = list(guardrail.features), {}

    def read(values: Tensor) -> None:
        seen["a"] = sae.encode(values.reshape(1, row.shape[1], -1))[0]

    def changed(values: Tensor) -> Tensor:
        a, out = seen["a"], values.clone().reshape(row.shape[1], -1)
        for t in range(1, row.shape[1]):
            if bool((a[t, ids] > 0).any()):
                clamped = a[t].clone()
                clamped[ids] = -guardrail.clamp.c
                out[t] = sae.decode(clamped) + (out[t] - sae.decode(a[t]))
        return out.view_as(values)

    places = port_at(model, guardrail.point), port_at(model, HookPoint(guardrail.layer, guardrail.hook_out))
    handles = [listen(places[0], read), listen(places[1], changed)]
    with torch.no_grad():
        logits = model(row).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "GPT2", "OPT", "Falcon", "Mixtral"])
def test_a_guardrail_at_any_place_is_the_full_formulation(name: str, hook: Hook, tokenizer: Any) -> None:
    model, row = small(name), prompts(12)[0]
    if name == "Falcon" and hook == "resid_mid":
        pytest.skip("Falcon's attention and MLP run side by side on one norm")
    sae = site_sae(model, hook)
    guardrail = site_guardrail(model, tokenizer, sae, -1.0)
    with torch.no_grad():
        unguarded = model(row).logits
    with guardrail.attach(model, tokenizer) as guard, torch.no_grad():
        guarded = model(row).logits
        assert guard.verdicts[0].triggered
    torch.testing.assert_close(guarded, full_logits(model, sae, guardrail, row), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(guarded, unguarded)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2", "OPT"])
def test_a_transcoder_is_read_at_one_place_and_clamped_at_another(name: str, tokenizer: Any) -> None:
    model, row = small(name), prompts(12)[0]
    sae = site_sae(model, "mlp_in", "mlp_out")
    guardrail = site_guardrail(model, tokenizer, sae, -1.0)
    with guardrail.attach(model, tokenizer), torch.no_grad():
        guarded = model(row).logits
    torch.testing.assert_close(guarded, full_logits(model, sae, guardrail, row), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hooks", [("attn_z", None), ("mlp_out", None), ("mlp_in", "mlp_out"), ("resid_pre", None)])
@pytest.mark.parametrize("name", ["Llama", "OPT"])
def test_at_any_place_cached_is_uncached_and_batched_is_one_by_one(name: str, hooks: Any, tokenizer: Any) -> None:
    model, rows = small(name), prompts(5, 9, 12)
    guardrail = site_guardrail(model, tokenizer, site_sae(model, *hooks), 0.9)
    with guardrail.attach(model, tokenizer) as guard:
        alone = []
        for row in rows:
            cached = generate(model, row)
            verdict = guard.verdicts[0]
            assert torch.equal(generate(model, row, use_cache=False), cached)
            same_verdicts(guard.verdicts, [verdict])
            alone.append((cached[0, row.shape[1] :], verdict))
        together = generate(model, padded(rows, "left"))
        assert torch.equal(together[:, max(row.shape[1] for row in rows) :], torch.stack([text for text, _ in alone]))
        same_verdicts(guard.verdicts, [verdict for _, verdict in alone])
