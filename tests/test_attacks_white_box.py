"""White box: token search, rounded weights, the answer read out behind the guard."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

from conftest import make_guardrail, make_model, make_sae
from saeguard.attacks import suffix, weights
from saeguard.attacks.attack import quiz
from saeguard.attacks.reading import AnswerProbe, Lens, at_layer, layers_behind
from saeguard.attacks.suffix import Bounds
from saeguard.clamp import Clamp
from saeguard.errors import ArtifactMismatchError
from saeguard.evaluation.harness import Settings, evaluate
from saeguard.evaluation.mcq import Question
from saeguard.evaluation.sources import QuestionSet
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.tasks.multiple_choice import MultipleChoice, question_items
from saeguard.gate import Cusum, Density, Evidence, Gate, Mean, Probe
from saeguard.model import residual_stream, unembed
from test_attacks import QUESTION, SETS
from topics import passages

EVERY = Settings(split="all")
ASKED = passages("garden", 40)
SCORERS = {
    "density": Density(),
    "evidence": Evidence(torch.tensor([1.0, 0.7, -0.6, 1.3, 0.4, -0.9]), 0.1),
    "probe": Probe(torch.linspace(-1, 1, 32), 0.2),
}


@pytest.fixture(scope="module")
def loader(llama, tokenizer) -> Loader:
    return Loader(lambda: (llama, tokenizer))


@pytest.fixture(scope="module")
def guarded(llama, tokenizer, loader) -> Subject:
    clamp = Clamp("dense", c=40.0, strength=8.0)
    return Subject.guarded(
        "guarded", loader, make_guardrail(llama, tokenizer, make_sae("jumprelu"), 2, threshold=-1.0, clamp=clamp)
    )


def gated(llama, tokenizer, scorer, *, accumulator=Cusum(0.05), threshold=0.5, **changes):  # noqa: B008
    gate = Gate(SCORERS[scorer], accumulator, **changes)
    return make_guardrail(llama, tokenizer, make_sae("relu"), 2, gate=gate, threshold=threshold)


class TestSearch:
    @pytest.mark.parametrize("scorer", SCORERS)
    @pytest.mark.parametrize("accumulator", [Cusum(0.05), Mean()])
    def test_what_is_differentiated_is_the_gate_itself(self, llama, tokenizer, scorer, accumulator):
        guardrail = gated(llama, tokenizer, scorer, accumulator=accumulator)
        search = suffix._Search(llama, tokenizer, guardrail, "", f"\n\n{quiz(QUESTION.text).text}")
        ids = torch.tensor([quiz(QUESTION.text).ids(tokenizer)])
        hidden = suffix.values_of_embeddings(llama, guardrail.point, llama.get_input_embeddings()(ids))
        with guardrail.attach(llama, tokenizer) as guard:
            (verdict,) = guard.judge(ids)
        found = float(search._soft(guardrail.rule, hidden, ids).detach())
        assert found == pytest.approx(verdict.statistic - verdict.threshold, abs=1e-4)

    @pytest.mark.parametrize("scorer", SCORERS)
    def test_the_statistic_falls(self, llama, tokenizer, loader, tmp_path, scorer):
        guardrail = gated(llama, tokenizer, scorer, accumulator=Mean(), moment="block")
        statistics = []
        for steps in (0, 6):
            (_, after) = suffix.attacks(loader, guardrail, Bounds(steps, 60), tmp_path)
            prompt = after.change(QUESTION, random.Random(3))
            assert QUESTION.text in prompt.text
            with guardrail.attach(llama, tokenizer) as guard:
                statistics.append(guard.judge(torch.tensor([prompt.ids(tokenizer)]))[0].statistic)
        assert statistics[1] < statistics[0]

    def test_after_a_running_gate_nothing_can_be_won(self, llama, tokenizer, loader, tmp_path):
        guardrail = gated(llama, tokenizer, "probe", accumulator=Cusum(-50.0), threshold=1.0)
        before, after = suffix.attacks(loader, replace(guardrail), Bounds(3, 60), tmp_path)
        assert before.change(QUESTION, random.Random(0)).calls == 3 * (suffix.CANDIDATES + 1)
        flat = gated(llama, tokenizer, "probe", accumulator=Cusum(1e6), threshold=1.0)
        _, after = suffix.attacks(loader, flat, Bounds(3, 60), tmp_path)
        assert after.change(QUESTION, random.Random(0)).calls == 1

    def test_it_is_bounded_in_time_and_found_once(self, llama, tokenizer, loader, tmp_path):
        guardrail = gated(llama, tokenizer, "probe")
        before, _ = suffix.attacks(loader, guardrail, Bounds(1000, 0.2), tmp_path)
        prompt = before.change(QUESTION, random.Random(0))
        assert 0.2 <= prompt.seconds < 5
        again, _ = suffix.attacks(loader, guardrail, Bounds(1000, 0.2), tmp_path)
        assert again.change(QUESTION, random.Random(9)) == prompt


class TestWeights:
    @pytest.mark.parametrize("bits", [8, 4, 2])
    @pytest.mark.parametrize("shape", [(6, 128), (5, 40)])
    def test_rounding_gives_few_levels_near_the_weights(self, bits, shape):
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        found = weights.rounded(values, bits)
        group = weights.GROUP if shape[1] % weights.GROUP == 0 else shape[1]
        for new, old in zip(found.reshape(-1, group), values.reshape(-1, group), strict=True):
            step = old.abs().max() / (2 ** (bits - 1) - 1)
            assert len(new.unique()) <= 2**bits - 1
            assert (new - old).abs().max() <= step / 2 + 1e-6
        assert torch.allclose(weights.rounded(found, bits), found, atol=1e-6)

    def test_zeros_stay_zeros(self):
        assert torch.equal(weights.rounded(torch.zeros(3, 64), 4), torch.zeros(3, 64))

    def test_the_guardrail_refuses_and_can_be_forced(self, tokenizer, guarded):
        model = make_model("llama")
        before = copy.deepcopy(model.state_dict())
        loader = Loader(lambda: (model, tokenizer))
        coarse = weights.quantised(loader, 4)
        assert "weights of the model: found" in weights.refusal(guarded.guardrail, coarse)
        assert weights.refusal(guarded.guardrail, loader) is None
        with pytest.raises(ArtifactMismatchError):
            evaluate([replace(guarded, loader=coarse)], [MultipleChoice(SETS)], EVERY)
        forced = weights.forced(guarded, guarded.guardrail, coarse)
        (run,) = evaluate([Subject("unguarded", coarse), forced], [MultipleChoice(SETS)], EVERY)
        assert all(record.triggered for record in run.records["guarded"])
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class TestReading:
    def test_after_the_last_block_the_lens_is_the_model(self, loader, guarded):
        items = tuple(question_items(SETS))
        subjects = [Subject("unguarded", loader), guarded]
        (lens,) = evaluate(subjects, [Lens(items, (3,))], EVERY)
        (clean,) = evaluate(subjects, [MultipleChoice(SETS)], EVERY)
        for name in ("unguarded", "guarded"):
            expected = {record.item: record.scores["accuracy"] for record in clean.records[name]}
            found = {record.item: record.scores["accuracy"] for record in at_layer(lens.records[name], 3)}
            assert found == expected

    def test_a_head_can_be_put_on_every_family(self, model):
        ids = torch.tensor([[1, 20, 30, 40]])
        with torch.inference_mode():
            last = residual_stream(model, 3, ids, torch.ones_like(ids))
            assert torch.allclose(unembed(model, last), model(ids).logits, atol=1e-4)

    def test_layers_are_behind_the_guard(self):
        assert layers_behind(6, 29) == [7, 14, 22, 29]
        assert layers_behind(2, 3) == [3]
        assert layers_behind(3, 3) == [3]

    def test_the_probe_finds_what_can_be_read(self, loader):
        words = ("zorb", "milen", "popple", "tarno")
        turned = [words[i % 4 :] + words[: i % 4] for i in range(40)]
        same = tuple(Question(f"{text}?", turned[i], turned[i].index("zorb")) for i, text in enumerate(ASKED))
        items = tuple(question_items([QuestionSet("topic", "topic", same)]))
        (run,) = evaluate([Subject("unguarded", loader)], [AnswerProbe(items[:20], items[20:], (2, 3))], EVERY)
        records = at_layer(run.records["unguarded"], 3)
        assert sum(record.scores["accuracy"] for record in records) >= 18

    def test_the_probe_is_tried_on_other_questions_than_it_is_trained_on(self, loader):
        items = tuple(question_items(SETS))
        (other,) = evaluate([Subject("unguarded", loader)], [AnswerProbe(items[:9], items[9:], (2, 3))], EVERY)
        assert {record.item for record in other.records["unguarded"]} == {item.id for item in items[:9]}
        assert AnswerProbe(items[:9], items[9:], (3,)).settings != AnswerProbe(items[:9], items[10:], (3,)).settings
