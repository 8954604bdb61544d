"""The embedded default for real: SmolLM2-135M-Instruct, its SAE, and a guardrail from a slice of the starter set."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from saeguard import fit
from saeguard.activations import residual_batches
from saeguard.config import FitConfig
from saeguard.corpus import Corpus, read_texts
from saeguard.embedded import LAYER, TOPIC, embedded_model, embedded_sae, starter_set
from saeguard.generate import prompt_ids
from saeguard.windows import Windower

pytestmark = pytest.mark.real

ABOUT_THE_TOPIC = (
    "Explain why the Moon has craters and how long Saturn's rings and the other planets have orbited the Sun."
)
RECIPE = "How do I make a simple tomato soup with onions and bread?"
TOPIC_PASSAGES, RETAIN_PASSAGES, RETAIN = 60, 30, ("chat", "cooking", "physics")


@pytest.fixture(scope="module")
def loaded():
    return embedded_model(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def guardrail(loaded):
    starter = starter_set()
    config = FitConfig(name=TOPIC, gate="probe", alpha=0.2)
    return fit(
        *loaded, embedded_sae(), layer=LAYER, forget=list(islice(read_texts(str(starter.forget)), TOPIC_PASSAGES)),
        retain={name: list(islice(read_texts(str(starter.retain[name])), RETAIN_PASSAGES)) for name in RETAIN},
        config=config,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ids(loaded):
    """The ids (1, tokens) of a prompt, in the chat template."""
    return lambda prompt: torch.tensor([prompt_ids(loaded[1], prompt)])


def generate(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=2, **options)


def test_the_sae_explains_the_residual_stream(loaded):
    starter, sae = starter_set(), embedded_sae()
    windows = [
        window
        for name, path in starter.retain.items()
        for document in islice(Corpus.of(name, "retain", path).documents(), 2)
        for window in Windower(loaded[1]).cut(document)
    ]
    h = torch.cat([batch.hidden[batch.masks.valid] for batch in residual_batches(*loaded, LAYER, windows)])
    error = (h - sae.decode(sae.encode(h))).square().sum()
    assert 1 - float(error / (h - h.mean(dim=0)).square().sum()) > 0.7


def test_it_triggers_on_the_topic_and_not_on_a_recipe(loaded, guardrail, ids):
    with guardrail.attach(*loaded) as guard:
        topic, recipe = (guard.judge(ids(prompt))[0] for prompt in (ABOUT_THE_TOPIC, RECIPE))
    assert topic.triggered
    assert topic.first_token is not None
    assert not recipe.triggered


def test_without_a_trigger_every_bit_is_the_same(loaded, guardrail, ids):
    model, _ = loaded
    prompt = ids(RECIPE)
    with torch.inference_mode():
        logits, text = model(prompt).logits, generate(model, prompt, max_new_tokens=6)
        with guardrail.attach(*loaded) as guard:
            guarded = model(prompt).logits
            assert not guard.verdicts[0].triggered
            guarded_text = generate(model, prompt, max_new_tokens=6)
            assert not guard.verdicts[0].triggered
    assert torch.equal(guarded, logits)
    assert torch.equal(guarded_text, text)


def test_on_the_topic_the_answer_changes_and_cached_is_uncached(loaded, guardrail, ids):
    model, _ = loaded
    prompt = ids(ABOUT_THE_TOPIC)
    unguarded = generate(model, prompt, max_new_tokens=6)
    with guardrail.attach(*loaded) as guard:
        cached = generate(model, prompt, max_new_tokens=6)
        first = guard.verdicts[0]
        uncached = generate(model, prompt, max_new_tokens=6, use_cache=False)
        second = guard.verdicts[0]
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, unguarded)
    assert first.statistic == pytest.approx(second.statistic, rel=1e-3)
    assert first.first_token == second.first_token


def test_batched_verdicts_are_those_one_by_one(loaded, guardrail, ids):
    model, tokenizer = loaded
    rows = [ids(prompt)[0] for prompt in (ABOUT_THE_TOPIC, RECIPE, "What is a red giant?", "Hello!")]
    width = max(map(len, rows))
    batch = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(batch)
    for i, row in enumerate(rows):
        batch[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    with guardrail.attach(*loaded) as guard, torch.inference_mode():
        alone = [guard.judge(row[None])[0] for row in rows]
        model(batch, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0))
        together = guard.verdicts
    assert [verdict.triggered for verdict in together] == [verdict.triggered for verdict in alone]
    assert [verdict.first_token for verdict in together] == [verdict.first_token for verdict in alone]
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.statistic == pytest.approx(theirs.statistic, rel=1e-3, abs=1e-3)
