"""Guardrails in a real vLLM on a tiny random model, against `attach` on the same model in transformers.

Skipped where vLLM is not installed. One process holds engine and worker, so that the worker can be looked at.
"""

import gc
import json
import os
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import SENTENCES, VOCABULARY, make_guardrail, make_sae
from saeguard.gate import Cusum, Evidence, Gate
from tiny import generate, prompts, with_rule

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": ""}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    vllm = pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs

    from saeguard.errors import ArtifactMismatchError, AttachError, EngineError, ProofError
    from saeguard.serving.vllm.engine import check_version
    from saeguard.serving.vllm.graph import GraphGuard
    from saeguard.serving.vllm.offline import close, guarded_llm, prove, verdicts
    from saeguard.serving.vllm.plugin import register
    from saeguard.serving.vllm.worker import stream_of

pytestmark = pytest.mark.filterwarnings("ignore")
NEW = 10
FIRES = " ".join(SENTENCES[:4])
"""A long text, which drives a CUSUM up."""
OPTIONS = {"dtype": "float32", "max_model_len": 192, "block_size": 32, "enforce_eager": True}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """Folder and model (heads as wide as vLLM wants them), prompts, and a guardrail that some of them trigger."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = prompts(5, 12, 20, 31, 44, 60, 9, 70, seed=5)
    gate = Gate(Evidence(torch.tensor([1.0, 0.7, -0.6, 1.3, 0.4, -0.9]), 0.013), Cusum(0.3))
    sae = make_sae("jumprelu", d_model=64)
    guardrail = make_guardrail(model, tokenizer, sae, 1, gate=gate, threshold=1e9)
    with guardrail.attach(model, tokenizer) as guard:

        def statistic(text: str) -> float:
            return guard.judge(torch.tensor([tokenizer(text)["input_ids"]]))[0].statistic

        fires, (silent, word) = statistic(FIRES), min((statistic(word), word) for word in FIRES.split())
        found = sorted(guard.judge(row)[0].statistic for row in rows)
    threshold = (found[2] + found[3]) / 2
    assert silent < threshold < fires
    evidence = {"proof": {"fires": FIRES, "silent": word}}
    guardrail = with_rule(guardrail, threshold=threshold, evidence=evidence, reach="onward")
    return folder, model, rows, guardrail


@contextmanager
def engine(world, tmp_path, guardrail=None, **options):
    """A guarded vLLM, closed at the end."""
    folder, _, _, own = world
    (guardrail or own).save_pretrained(tmp_path / "guard")
    gc.collect()
    llm = guarded_llm(str(folder), {"topic": str(tmp_path / "guard")}, **OPTIONS | options)
    try:
        yield llm
    finally:
        close(llm)
        del llm
        gc.collect()


def worker_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker


def ask(llm, rows, **sampling):
    params = vllm.SamplingParams(**{"temperature": 0, "max_tokens": NEW, "min_tokens": NEW} | sampling)
    return llm.generate([{"prompt_token_ids": row[0].tolist()} for row in rows], params, use_tqdm=False)


def agrees(llm, world, tokenizer, rows, outputs):
    """Every sequence that vLLM read has the verdict that `attach` gives it."""
    _, model, _, guardrail = world
    seen = []
    with guardrail.attach(model, tokenizer) as guard:
        for row, output in zip(rows, outputs, strict=True):
            found = verdicts(llm, output.request_id)
            assert len(found) == len(output.outputs)
            for (mine,), answer in zip(found, output.outputs, strict=True):
                read = row[0].tolist() + list(answer.token_ids)[:-1]
                theirs = guard.judge(torch.tensor([read]))[0]
                assert mine["rule"] == "topic"
                assert mine["statistic"] == pytest.approx(theirs.statistic, abs=1e-4)
                assert (mine["triggered"], mine["first_token"]) == (theirs.triggered, theirs.first_token)
                assert tuple(mine["features"]) == theirs.features
                seen.append(mine["triggered"])
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 8, "max_num_batched_tokens": 16},
        {"max_num_seqs": 8, "num_gpu_blocks_override": 9},
    ],
    ids=["one by one", "chunks", "preemption"],
)
def test_same_answers_and_verdicts_as_attach(options, world, tokenizer, tmp_path):
    _, model, rows, guardrail = world
    with guardrail.attach(model, tokenizer):
        expected = [generate(model, row)[0, row.shape[1] :].tolist() for row in rows]
    plain = [generate(model, row)[0, row.shape[1] :].tolist() for row in rows]
    assert expected != plain, "the clamp shows in the answers"
    starts: Counter[str] = Counter()
    with engine(world, tmp_path, **options) as llm:
        book = worker_of(llm).book
        begin = book.begin

        def counted(requests, ids):
            starts.update(name for name, position, _ in requests if position == 0)
            begin(requests, ids)

        book.begin = counted
        outputs = ask(llm, rows)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        assert set(agrees(llm, world, tokenizer, rows, outputs)) == {True, False}
    assert (max(starts.values()) > 1) == ("num_gpu_blocks_override" in options), "preempted requests start over"


def test_prompts_that_are_read_in_one_step_are_clamped_whole(world, tokenizer, tmp_path):
    _, model, rows, onward = world
    guardrail = with_rule(onward, reach="all")
    answers = {}
    for name, one in {"all": guardrail, "onward": onward}.items():
        with one.attach(model, tokenizer) as guard:
            early = [guard.judge(row)[0].triggered for row in rows]
            answers[name] = [generate(model, row)[0, row.shape[1] :].tolist() for row in rows]
            late = [v.triggered for row in rows for v in guard.judge(generate(model, row)[:, :-1])]
    settled = [i for i, row in enumerate(rows) if early[i] or not late[i]]
    with engine(world, tmp_path, guardrail, max_num_seqs=8) as llm:
        outputs = ask(llm, rows)
    for i in settled:
        assert list(outputs[i].outputs[0].token_ids) == answers["all"][i]
    assert any(answers["all"][i] != answers["onward"][i] for i in settled)


def test_the_operator_in_a_compiled_engine_does_the_same(world, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("SAEGUARD_COMPILED", "1")
    _, model, rows, guardrail = world
    with guardrail.attach(model, tokenizer):
        expected = [generate(model, row)[0, row.shape[1] :].tolist() for row in rows]
    with engine(world, tmp_path, enforce_eager=False, max_num_seqs=8, max_num_batched_tokens=24) as llm:
        assert isinstance(worker_of(llm).guarded_layers[0].guard, GraphGuard)
        outputs = ask(llm, rows)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        agrees(llm, world, tokenizer, rows, outputs)


def test_what_a_decoder_layer_may_return():
    hidden, residual = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert stream_of(hidden) == (hidden, None)
    both, second = stream_of((hidden, residual))
    assert torch.equal(both, hidden + residual)
    assert second is residual
    for other in ((hidden, None), (hidden, residual, residual), {"hidden": hidden}):
        with pytest.raises(EngineError, match="a decoder layer returned"):
            stream_of(other)


def test_each_answer_of_a_request_has_its_verdict_and_aborting_one_disturbs_none(world, tokenizer, tmp_path):
    rows = world[2]
    with engine(world, tmp_path, max_num_seqs=8, max_num_batched_tokens=24) as llm:
        outputs = ask(llm, rows[:4], n=3, temperature=1.0)
        agrees(llm, world, tokenizer, rows[:4], outputs)
        running = llm.llm_engine
        params = vllm.SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        for i, row in enumerate(rows[4:7]):
            running.add_request(f"gone-{i}", {"prompt_token_ids": row[0].tolist()}, params)
        for _ in range(4):
            running.step()
        assert verdicts(llm, "gone-0"), "a verdict can be read while the answer is being written"
        running.abort_request([f"gone-{i}" for i in range(3)])
        again = ask(llm, rows)
        agrees(llm, world, tokenizer, rows, again)
        book = worker_of(llm).book
        ask(llm, rows[:1])
        assert len(book._slots.live()) <= 1, "finished requests free their slots"


def test_several_guardrails_and_monitoring(world, tokenizer, tmp_path):
    folder, model, rows, guardrail = world
    plain = [generate(model, row)[0, row.shape[1] :].tolist() for row in rows]
    watched = with_rule(guardrail, action="monitor")
    deeper = replace(watched, layer=2)
    proof = guardrail.rule.evidence["proof"]
    with deeper.attach(model, tokenizer) as guard:
        texts = (torch.tensor([tokenizer(proof[name])["input_ids"]]) for name in ("fires", "silent"))
        deeper = with_rule(deeper, threshold=sum(guard.judge(ids)[0].statistic for ids in texts) / 2)
        expected = [guard.judge(row)[0].statistic for row in rows]
    folders = {name: str(one.save_pretrained(tmp_path / name)) for name, one in (("a", watched), ("b", deeper))}
    gc.collect()
    llm = guarded_llm(str(folder), folders, **OPTIONS)
    outputs = ask(llm, rows)
    assert [list(output.outputs[0].token_ids) for output in outputs] == plain
    for row, output, statistic in zip(rows, outputs, expected, strict=True):
        first, second = verdicts(llm, output.request_id)[0]
        assert (first["rule"], second["rule"]) == ("a", "b")
        assert second["statistic"] >= statistic - 1e-4, f"of {row.shape[1]} tokens, and of the answer"
    close(llm)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"enable_prefix_caching": True}, EngineError, "prefix caching"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, EngineError, "speculative"),
        ({"worker_cls": "some.Worker"}, EngineError, "--worker-cls"),
        ({"hf_overrides": {"rope_theta": 1.0}}, EngineError, "overrides"),
        ({"enable_lora": True}, EngineError, "LoRA"),
    ],
)
def test_what_cannot_be_guarded_is_refused(changes, error, words, world, tmp_path):
    with pytest.raises(error, match=words), engine(world, tmp_path, **changes):
        pass


def test_a_guardrail_that_does_not_fit_starts_nothing(world, tmp_path):
    guardrail = world[3]
    with (
        pytest.raises(EngineError, match="decides by block"),
        engine(world, tmp_path, with_rule(guardrail, gate=replace(guardrail.gate, moment="block"))),
    ):
        pass
    with (
        pytest.raises(EngineError, match="hook point of guardrail topic: found mlp_out"),
        engine(world, tmp_path, replace(guardrail, hook="mlp_out", hook_out="mlp_out")),
    ):
        pass
    foreign = replace(guardrail, model={**guardrail.model, "weights": "0" * 16})
    with pytest.raises(ArtifactMismatchError, match="weights"), engine(world, tmp_path, foreign):
        pass
    with pytest.raises(ProofError, match="did not fire"), engine(world, tmp_path, with_rule(guardrail, threshold=1e9)):
        pass


def test_nothing_is_served_unguarded(world, tmp_path):
    folder, _, rows, guardrail = world
    guardrail.save_pretrained(tmp_path / "guard")
    os.environ["SAEGUARD_GUARDRAILS"] = f"topic={tmp_path / 'guard'}"
    register()
    llm = vllm.LLM(str(folder), **OPTIONS)
    with pytest.raises(ProofError, match="before the start-up proof"):
        ask(llm, rows[:1])
    close(llm)
    del llm
    gc.collect()
    llm = vllm.LLM(str(folder), **OPTIONS)
    prove(llm)
    layer = worker_of(llm).guarded_layers[0]
    worker_of(llm)._serving = lambda serving: None
    assert not layer.serving
    with pytest.raises(AttachError, match="without its layer"):
        ask(llm, rows[:1])
    close(llm)


def test_the_plugin_leaves_vllm_alone_unless_asked(monkeypatch):
    monkeypatch.delenv("SAEGUARD_GUARDRAILS", raising=False)
    before = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is before
    monkeypatch.setenv("VLLM_PLUGINS", "other,saeguard")
    with pytest.raises(Exception, match="expected id=DIR"):
        register()


def test_a_vllm_that_is_not_known_is_refused():
    check_version("0.32.1+cpu")
    for version in ("0.33.0", "1.0", "0.3.2"):
        with pytest.raises(EngineError, match=f"found {version}"):
            check_version(version)


def test_verdicts_are_json(world, tokenizer, tmp_path):
    with engine(world, tmp_path) as llm:
        output = ask(llm, world[2][:1])[0]
        assert json.loads(json.dumps(verdicts(llm, output.request_id))) == verdicts(llm, output.request_id)
        assert verdicts(llm, "unknown") == []
