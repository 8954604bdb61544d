"""The methods that a guardrail is compared with: each against a slow formulation, and as a user runs them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from conftest import D_SAE, make_guardrail, make_sae
from saeguard import Guardrail
from saeguard.baselines import settings
from saeguard.baselines.catalogue import BASELINES, Trial
from saeguard.baselines.guarded import ALWAYS, config_of
from saeguard.baselines.prompt_gate import KIND, PromptGate
from saeguard.baselines.prompted import fit_prompt_gate, read_prompts
from saeguard.baselines.prompts import Tfidf
from saeguard.clamp import Clamp
from saeguard.cli.main import main
from saeguard.errors import ArtifactDamagedError, ArtifactError, AttachError, CorpusOverlapError, SelectionError
from saeguard.evaluation.mcq import Question, answer_batch, answer_questions
from saeguard.evaluation.subject import Loader, Subject
from saeguard.gate import Density, Gate
from saeguard.model import decoder_layer, residual_stream
from saeguard.selection import SelectionRule, select
from saeguard.serving.proof_texts import ProofTexts
from saeguard.statistics import FeatureStatistics
from saeguard.tokens import special_token_ids
from tiny import generate, hooks_on, padded, prompts
from topics import LAYER, passages, save_all

FEATURES = (3, 7, 11, 19, 23, 42)
QUESTIONS = [Question(f"{t}?", tuple(t.split()[:4]), 1) for t in passages("forget", 6, words=8, seed=3)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, llama, tokenizer):
    """Model, SAE and enough text to calibrate on, as files; and the options that name them."""
    folder = tmp_path_factory.mktemp("baselines")
    save_all(folder, llama, tokenizer, make_sae("jumprelu"))
    for name in ("forget", "kitchen", "garden"):
        lines = (json.dumps({"text": text}) + "\n" for text in passages(name, 90))
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    return folder


def trial(files, model, tokenizer, out, chosen, **changes):
    retain = {name: str(files / f"{name}.jsonl") for name in ("kitchen", "garden")}
    made = Trial(chosen, lambda: (model, tokenizer), str(files / "forget.jsonl"), retain, make_sae("jumprelu"), LAYER,
                 out, files / "work", force=True)  # fmt: skip
    return replace(made, **changes)


@pytest.fixture(scope="module")
def gate(files, tokenizer) -> PromptGate:
    """A prompt gate on the invented topics, that corrupts."""
    sources = [read_prompts(n, str(files / f"{n}.jsonl"), tokenizer) for n in ("forget", "kitchen", "garden")]
    return fit_prompt_gate([one for its in sources for one in its], settings.PromptCorrupt(alpha=0.1), 0)


def always_on(model, tokenizer, kind):
    return make_guardrail(
        model, tokenizer, make_sae("jumprelu"), LAYER, gate=Gate(Density()), threshold=ALWAYS,
        clamp=Clamp(kind, c=20.0, strength=1.0),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["active", "dense"])
def test_a_clamp_that_is_always_on_is_encode_clamp_decode_at_every_token_with_an_active_feature(llama, tokenizer, kind):
    sae, row = make_sae("jumprelu"), prompts(40, seed=1)[0]
    hidden = residual_stream(llama, LAYER, row, torch.ones_like(row))[0]
    expected = hidden.clone()
    for t, token in enumerate(row[0].tolist()):
        if t == 0 or token in special_token_ids(tokenizer):
            continue
        a = sae.encode(hidden[t][None])[0]
        clamped = a.clone()
        active = [j for j in FEATURES if a[j] > 0]
        for j in FEATURES if kind == "dense" and active else active:
            clamped[j] = -20.0
        expected[t] = sae.decode(clamped) + (hidden[t] - sae.decode(a))
    assert float((expected - hidden).norm()) > 20
    with always_on(llama, tokenizer, kind).attach(llama, tokenizer) as guard:
        seen = []
        handle = decoder_layer(llama, LAYER).register_forward_hook(lambda _m, _a, out: seen.append(out))
        llama(row)
        handle.remove()
        assert guard.verdicts[0].triggered
    torch.testing.assert_close(seen[0][0], expected, atol=1e-4, rtol=1e-4)


def test_without_a_sequence_gate_a_cache_changes_nothing(llama, tokenizer):
    row = prompts(14)[0]
    with always_on(llama, tokenizer, "active").attach(llama, tokenizer):
        assert torch.equal(generate(llama, row), generate(llama, row, use_cache=False))


def test_selection_by_retain_threshold_is_the_brute_force_one():
    forget = FeatureStatistics.of(torch.rand(200, D_SAE) * (torch.rand(200, D_SAE) < torch.rand(D_SAE)))
    retain = {
        name: FeatureStatistics.of(torch.rand(300, D_SAE) * (torch.rand(300, D_SAE) < 0.6 * torch.rand(D_SAE)))
        for name in ("a", "b")
    }
    rates = [max(float(its.fired[j]) / 300 for its in retain.values()) for j in range(D_SAE)]
    allowed = [j for j in range(D_SAE) if rates[j] <= 0.2 and forget.fired[j] > 0]
    expected = sorted(allowed, key=lambda j: (-int(forget.fired[j]), j))[:5]
    assert [one.id for one in select(forget, retain, SelectionRule(n=5, retain_rate=0.2))] == expected
    with pytest.raises(SelectionError, match="raise --retain-rate"):
        select(forget, retain, SelectionRule(n=60, retain_rate=0.01))


@pytest.mark.parametrize("name", [n for n, one in BASELINES.items() if not one.trains_weights])
def test_every_method_writes_what_eval_reads(files, llama, tokenizer, tmp_path, name):
    baseline = BASELINES[name]
    chosen = replace(baseline.settings(), **({"n": 4} if "n" in vars(baseline.settings()) else {}))
    chosen = replace(chosen, **{k: v for k, v in {"p_ratio": 50.0, "retain_rate": 1.0}.items() if hasattr(chosen, k)})
    cost = baseline.run(trial(files, llama, tokenizer, tmp_path / name, chosen))
    assert cost.peak_memory_mb > 100
    loader = Loader(lambda: (llama, tokenizer))
    with Subject.fitted(name, loader, str(tmp_path / name)).open() as it:
        answers = answer_batch(it.model, it.tokenizer, QUESTIONS, it.guard, "cloze")
    refuses = name in ("probe-refuse", "prompt-refuse")
    assert [answer.refused for answer in answers] == [refuses and answer.triggered for answer in answers]
    assert not any(answer.right for answer in answers if answer.refused)
    assert hooks_on(llama) == 0


def test_static_and_conditional_trigger_on_everything_and_say_so(files, llama, tokenizer, tmp_path):
    BASELINES["conditional"].run(trial(files, llama, tokenizer, tmp_path / "c", settings.Conditional(n=2)))
    rule = Guardrail.from_pretrained(tmp_path / "c").rule
    figures = rule.evidence["gates"]["density"]
    assert figures["caught"]["rate"] == 1.0
    assert {row["rate"] for row in figures["false_positives"].values()} == {1.0}
    assert (rule.clamp.kind, rule.gate.always(rule.threshold)) == ("active", True)
    assert ProofTexts.of(rule).ordinary == ()


def test_settings_become_settings_of_fit():
    assert (config_of(settings.DSG(), 0).moment, config_of(settings.DSG(), 0).c) == ("block", None)
    assert config_of(settings.ProbeRefuse(), 0).action == "refuse"
    assert config_of(settings.Static(clamp="dense"), 3).seed == 3


@pytest.mark.parametrize("name", BASELINES)
def test_every_grid_is_of_settings_that_exist_and_has_eight(name):
    one = BASELINES[name]
    count = 1
    for axis, values in one.grid.items():
        assert all(hasattr(replace(one.settings(), **{axis: value}), axis) for value in values)
        count *= len(values)
    assert count >= 8


def test_refused_questions_are_not_answered_and_others_keep_their_answers(llama, tokenizer):
    loud = replace(always_on(llama, tokenizer, "dense"))
    refusing = replace(loud, rules=(replace(loud.rule, action="refuse"),))
    quiet = replace(loud, rules=(replace(loud.rule, action="refuse", threshold=2.0),))
    plain = answer_questions(llama, tokenizer, QUESTIONS)
    assert any(answer.right for answer in plain)
    refused = answer_questions(llama, tokenizer, QUESTIONS, refusing)
    assert all(answer.refused and not answer.right for answer in refused)
    through = answer_questions(llama, tokenizer, QUESTIONS, quiet)
    assert [(a.chosen, a.right, a.refused) for a in through] == [(a.chosen, a.right, False) for a in plain]


def rows_of(tokenizer, *topics):
    texts = [passages(topic, 1, seed=5)[0] for topic in topics]
    return [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]


def test_corruption_leaves_a_prompt_that_does_not_trigger_bit_identical(gate, llama, tokenizer):
    topic, other = rows_of(tokenizer, "forget", "kitchen")
    plain = llama(other).logits, llama(topic).logits
    with gate.attach(llama, tokenizer) as guard:
        assert torch.equal(llama(other).logits, plain[0])
        assert [verdict.triggered for verdict in guard.verdicts] == [False]
        assert not torch.equal(llama(topic).logits, plain[1])
        assert [verdict.triggered for verdict in guard.verdicts] == [True]
    assert torch.equal(llama(topic).logits, plain[1])
    assert hooks_on(llama) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_corruption_is_the_same_in_a_batch(gate, llama, tokenizer, side):
    rows = rows_of(tokenizer, "forget", "kitchen", "forget", "garden")
    inputs = padded([*rows[:2], rows[2][:, :9], rows[3]], side)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with gate.attach(llama, tokenizer) as guard:
        together = llama(**inputs, position_ids=positions).logits
        assert [verdict.triggered for verdict in guard.verdicts] == [True, False, True, False]
        for i in range(4):
            kept = inputs["input_ids"][i, mask[i].bool()][None]
            torch.testing.assert_close(together[i, mask[i].bool()], llama(kept).logits[0], atol=1e-3, rtol=1e-3)


def test_corruption_is_of_the_prompt_and_not_of_what_is_read_on_from_it(gate, llama, tokenizer):
    (topic,) = rows_of(tokenizer, "forget")
    with gate.attach(llama, tokenizer) as guard:
        whole = generate(llama, topic)
        first = llama(topic, use_cache=True)
        later = llama(whole[:, topic.shape[1] :][:, :1], past_key_values=first.past_key_values)
        assert [verdict.triggered for verdict in guard.verdicts] == [True]
    assert int(first.logits[0, -1].argmax()) == int(whole[0, topic.shape[1]])
    assert int(later.logits[0, -1].argmax()) == int(whole[0, topic.shape[1] + 1])


def test_a_prompt_gate_needs_ids(gate, llama, tokenizer):
    with gate.attach(llama, tokenizer), pytest.raises(AttachError, match="input_ids"):
        llama(inputs_embeds=torch.zeros(1, 4, 32))
    assert hooks_on(llama) == 0


def test_a_prompt_gate_is_read_back_as_it_was_and_damage_is_found(gate, tokenizer, tmp_path):
    texts = passages("forget", 5, seed=7) + passages("garden", 5, seed=7)
    folder = gate.save_pretrained(tmp_path / "gate")
    again = PromptGate.from_pretrained(folder)
    assert again.classifier.scores(texts) == gate.classifier.scores(texts)
    assert (again.identity, again.evidence) == (gate.identity, json.loads(json.dumps(gate.evidence)))
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    raw = bytearray((folder / KIND.tensor_file).read_bytes())
    raw[-1] ^= 1
    (folder / KIND.tensor_file).write_bytes(raw)
    with pytest.raises(ArtifactDamagedError, match="altered"):
        PromptGate.from_pretrained(folder)
    with pytest.raises(ArtifactError):
        Guardrail.from_pretrained(folder)


def test_tfidf_is_scikit_learns(tokenizer):
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = passages("forget", 30) + passages("kitchen", 30)
    expected = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2).fit_transform(texts).toarray()
    assert Tfidf.of(texts).rows(texts).toarray() == pytest.approx(expected, abs=1e-6)


def test_text_on_both_sides_is_refused(files, llama, tokenizer, tmp_path):
    both = {"kitchen": str(files / "forget.jsonl")}
    with pytest.raises(CorpusOverlapError):
        BASELINES["prompt-refuse"].run(trial(files, llama, tokenizer, tmp_path / "x", settings.Prompted(), retain=both))


def test_the_command_fits_and_lists(files, tmp_path, capsys):
    retain = [f"{name}={files / name}.jsonl" for name in ("kitchen", "garden")]
    model = ["--model", str(files / "model"), "--dtype", "float32", "--device", "cpu"]
    words = ["baseline", "prompt-refuse", *model, "--forget", str(files / "forget.jsonl"), "--retain", *retain]
    assert main([*words, "--out", str(tmp_path / "gate"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["settings"]["alpha"]) == ("prompt-refuse", 0.05)
    assert PromptGate.from_pretrained(tmp_path / "gate").action == "refuse"
    assert main(["baseline", "list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(BASELINES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["static", "--forget", "x.jsonl", "--out", "x"], "--forget and --retain go together"),
        (["static", "--model", "m", "--out", "x"], "--sae is needed"),
    ],
)
def test_wrong_use_is_named(words, message, capsys):
    assert main(["baseline", *words]) == 2
    assert message in capsys.readouterr().err
