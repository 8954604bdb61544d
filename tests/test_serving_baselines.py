"""A server of what guardrails are compared with: prompt gates beside guardrails, and checkpoints without any."""

# ruff: noqa: E402  (what needs the extra comes after the question whether it is installed)
from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
httpx = pytest.importorskip("httpx")

from conftest import make_guardrail, make_model, make_sae
from saeguard.baselines import settings
from saeguard.baselines.prompt_gate import PromptGate
from saeguard.baselines.prompted import fit_prompt_gate, read_prompts
from saeguard.choices import REFUSAL
from saeguard.cli.bench_serve import read_ready
from saeguard.cli.main import main
from saeguard.errors import AttachError, ProofError, UsageError
from saeguard.generate import prompt_ids
from saeguard.serving.config import ServeConfig
from saeguard.serving.http.server import service
from saeguard.serving.load import Target
from saeguard.serving.policy import load_guardrails
from served import NAME, proven, served
from tiny import generate, hooks_on, with_rule
from topics import LAYER, passages, save_all

# PEFT asks transformers 5 by an older name; transformers 4.57 wonders at checkpoints that follow each other so fast.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),
]
TOPIC, KITCHEN, GARDEN = (passages(name, 1, seed=9)[0] for name in ("forget", "kitchen", "garden"))


@pytest.fixture(scope="module")
def gate(tmp_path_factory, tokenizer) -> PromptGate:
    """A prompt gate on the invented topics, that refuses."""
    folder, prompts = tmp_path_factory.mktemp("gate"), []
    for name in ("forget", "kitchen", "garden"):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages(name, 90)), "utf-8")
        prompts += read_prompts(name, str(file), tokenizer)
    return fit_prompt_gate(prompts, settings.Prompted(alpha=0.1), 0)


@pytest.fixture(scope="module")
def corrupting(gate) -> PromptGate:
    return replace(gate, action="corrupt", strength=4.0)


@pytest.fixture(scope="module")
def topic(llama, tokenizer):
    return proven(make_guardrail(llama, tokenizer, make_sae("relu"), LAYER), llama, tokenizer)


def body(content: str, **fields: Any) -> dict[str, Any]:
    message = [{"role": "user", "content": content}]
    return {"model": NAME, "temperature": 0, "max_tokens": 8, "messages": message} | fields


def ask(url: str, content: str, **fields: Any) -> Any:
    response = httpx.post(f"{url}/v1/chat/completions", json=body(content, **fields), timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def said(answer: Mapping[str, Any]) -> str:
    found: str = answer["choices"][0]["message"]["content"]
    return found


def alone(model: Any, tokenizer: Any, content: str, *attached: Any) -> str:
    """The answer of plain `generate`, inside these contexts."""
    row = torch.tensor([prompt_ids(tokenizer, content)])
    with ExitStack() as stack:
        for its in attached:
            stack.enter_context(its.attach(model, tokenizer))
        whole = generate(model, row, max_new_tokens=8, min_new_tokens=0)
    return str(tokenizer.decode(whole[0, row.shape[1] :], skip_special_tokens=True))


def test_a_prompt_gate_refuses_what_it_would_alone_beside_a_guardrail(gate, llama, tokenizer, topic):
    with served(make_model("llama"), tokenizer, {"topic": topic, "gate": gate}) as found:
        refused, other = ask(found.url, TOPIC), ask(found.url, KITCHEN)
        listed = httpx.get(f"{found.url}/v1/models").json()["data"][0]["saeguard"]
        figures = httpx.get(f"{found.url}/metrics").text
    with gate.attach(llama, tokenizer) as guard:
        llama(torch.tensor([prompt_ids(tokenizer, TOPIC)]))
        (verdict,) = guard.verdicts
    assert (said(refused), refused["choices"][0]["finish_reason"]) == (REFUSAL, "content_filter")
    assert [row["id"] for row in refused["saeguard"]] == ["topic", "gate"] == [row["id"] for row in listed]
    row = refused["saeguard"][1]
    assert (row["rule"], row["action"], row["triggered"], row["first_token"]) == ("prompt", "refuse", True, 0)
    assert (row["statistic"], row["threshold"]) == (pytest.approx(verdict.statistic), gate.threshold)
    assert said(other) == alone(llama, tokenizer, KITCHEN, topic)
    assert not other["saeguard"][1]["triggered"]
    assert 'saeguard_triggered_total{action="refuse",guardrail="gate",rule="prompt"} 1.0' in figures
    assert 'saeguard_hot_density_count{action="refuse",guardrail="gate"' not in figures


def test_a_prompt_is_corrupted_as_it_would_be_alone_and_only_where_the_request_lets_it(corrupting, llama, tokenizer):
    prompts = [TOPIC, KITCHEN, passages("forget", 1, words=5, seed=4)[0], GARDEN]
    with served(make_model("llama"), tokenizer, {"gate": corrupting}, allow_guardrail_choice=True) as found:
        rows = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        request = {"model": NAME, "temperature": 0, "max_tokens": 8, "prompt": rows}
        answers = httpx.post(f"{found.url}/v1/completions", json=request, timeout=60).json()
        spared = ask(found.url, TOPIC, saeguard={"guardrails": []})
        changed = ask(found.url, TOPIC)
    assert [row["triggered"] for row in answers["saeguard"]] == [True, False, True, False]
    for row, choice in zip(rows, answers["choices"], strict=True):
        with corrupting.attach(llama, tokenizer):
            whole = generate(llama, torch.tensor([row]), max_new_tokens=8, min_new_tokens=0)
        assert choice["text"] == tokenizer.decode(whole[0, len(row) :], skip_special_tokens=True)
    assert (said(spared), spared["saeguard"]) == (alone(llama, tokenizer, TOPIC), [])
    assert said(changed) == alone(llama, tokenizer, TOPIC, corrupting) != said(spared)


def test_under_monitor_the_text_is_that_of_the_model(gate, llama, tokenizer):
    with served(make_model("llama"), tokenizer, {"gate": replace(gate, action="monitor")}) as found:
        answer = ask(found.url, TOPIC)
    assert said(answer) == alone(llama, tokenizer, TOPIC)
    assert answer["saeguard"][0]["triggered"]


def test_each_token_is_told_of_in_the_order_of_the_guardrails(gate, llama, tokenizer, topic):
    deeper = proven(make_guardrail(llama, tokenizer, make_sae("topk"), LAYER + 1), llama, tokenizer)
    its = {"first": topic, "deeper": deeper, "gate": gate, "last": topic}
    with served(make_model("llama"), tokenizer, its, playground=True) as found:
        listed = httpx.get(f"{found.url}/v1/guardrails").json()["data"]
        trace = httpx.post(f"{found.url}/v1/guardrails/trace", json={"text": TOPIC}, timeout=60).json()
    assert [row["id"] for row in listed] == list(its)
    assert listed[2]["features"] == []
    for token in trace["tokens"]:
        assert [reading["id"] for reading in token["readings"]] == list(its)
        assert (token["readings"][2]["triggered"], token["readings"][2]["hot"]) == (True, False)
    assert [row["id"] for row in trace["saeguard"]] == list(its)


def test_a_prompt_gate_is_proved_before_it_serves(gate, llama, tokenizer):
    for threshold, found in ((1e9, "did not fire"), (-1e9, "every ordinary text fired")):
        with (
            pytest.raises(ProofError, match=found),
            service(llama, tokenizer, {"gate": replace(gate, threshold=threshold)}, ServeConfig()),
        ):
            pass
    with (
        pytest.raises(ProofError, match="carries no text"),
        service(llama, tokenizer, {"gate": replace(gate, evidence={})}, ServeConfig()),
    ):
        pass
    assert hooks_on(llama) == 0


def test_a_guardrail_is_not_given_corrupted_prompts_to_read(corrupting, llama, tokenizer, topic):
    with (
        pytest.raises(UsageError, match="corrupts prompts"),
        service(llama, tokenizer, {"topic": topic, "gate": corrupting}, ServeConfig()),
    ):
        pass
    assert hooks_on(llama) == 0


def test_what_a_guardrail_reads_again_is_no_prompt(gate, corrupting, llama, tokenizer, topic):
    row = torch.tensor([prompt_ids(tokenizer, KITCHEN)])
    within = with_rule(topic, threshold=-1.0)
    late = with_rule(topic, threshold=_just_below_the_last(topic, llama, tokenizer, row))
    for guardrail in (within, late):
        with gate.attach(llama, tokenizer) as prompts, guardrail.attach(llama, tokenizer) as guard:
            llama(row, use_cache=True)
            assert guard.verdicts[0].triggered
            assert [verdict.triggered for verdict in prompts.verdicts] == [False]
    with (
        corrupting.attach(llama, tokenizer), late.attach(llama, tokenizer),
        pytest.raises(AttachError, match="Use one of the two"),
    ):  # fmt: skip
        llama(row, use_cache=True)
    assert hooks_on(llama) == 0


def _just_below_the_last(topic: Any, model: Any, tokenizer: Any, row: torch.Tensor) -> float:
    """A threshold that is passed for the first time where the statistic is highest."""
    with topic.attach(model, tokenizer) as guard:
        model(row, use_cache=True)
        values = guard.last.rules[0].statistics[0]
    order = values.unique().sort().values
    return float((order[-1] + order[-2]) / 2)


def test_what_an_operator_may_choose(gate, corrupting, tmp_path):
    gate.save_pretrained(tmp_path / "refusing")
    corrupting.save_pretrained(tmp_path / "corrupting")
    folders = [str(tmp_path / "refusing"), str(tmp_path / "corrupting")]
    found = load_guardrails(folders, ["corrupting=refuse", "refusing=monitor"])
    assert {name: its.action for name, its in found.items()} == {"refusing": "monitor", "corrupting": "refuse"}
    for action in ("refusing=corrupt", "refusing=clamp", "corrupting=clamp"):
        with pytest.raises(UsageError, match="expected an action of"):
            load_guardrails(folders, [action])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, tokenizer):
    """A model with text, a guardrail fitted on it, and what `baseline` wrote: weights and an adapter."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("checkpoints")
    assert main([*save_all(folder, llama, tokenizer, make_sae("jumprelu")), "--out", str(folder / "guard")]) == 0
    words = [
        "--model", folder / "model", "--dtype", "float32", "--device", "cpu", "--forget", folder / "forget.jsonl",
        "--retain", *(f"{name}={folder}/{name}.jsonl" for name in ("kitchen", "garden")),
        "--steps", 8, "--learning-rate", 0.01, "--max-tokens", 16, "--check-every", 8,
    ]  # fmt: skip
    for name, more in (("whole", []), ("adapter", ["--lora-rank", 2])):
        made = ["baseline", "grad-diff", *words, *more, "--out", folder / name]
        assert main([str(word) for word in made]) == 0
    return folder


@pytest.fixture
def model_words(folder) -> list[str]:
    return ["--model", str(folder / "model"), "--dtype", "float32", "--device", "cpu"]


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "saeguard.cli.main", "serve", *words, "--port", "0", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_checkpoint_is_served_as_it_is(kind, folder, model_words, llama, tokenizer):
    from saeguard.adapters import merged
    from saeguard.model import load_model

    checkpoint = str(folder / kind)
    with start(*model_words, "--checkpoint", checkpoint, "--served-name", NAME) as child:
        try:
            ready = read_ready(child)
            answers = [ask(ready["url"], prompt) for prompt in (TOPIC, KITCHEN)]
        finally:
            child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    model = merged(make_model("llama"), checkpoint) if kind == "adapter" else load_model(checkpoint, device="cpu")[0]
    assert child.returncode == 0
    assert (ready["model"], ready["guardrails"]) == (NAME, [])
    expected = [alone(model, tokenizer, prompt) for prompt in (TOPIC, KITCHEN)]
    assert [said(answer) for answer in answers] == expected
    assert expected != [alone(llama, tokenizer, prompt) for prompt in (TOPIC, KITCHEN)]
    assert all(answer["saeguard"] == [] for answer in answers)


def test_a_checkpoint_is_not_what_a_guardrail_of_the_model_was_fitted_on(folder, model_words, capsys):
    for kind in ("whole", "adapter"):
        words = ["--checkpoint", str(folder / kind), "--guardrail", str(folder / "guard")]
        assert main(["serve", *model_words, *words]) == 1
        assert "ArtifactMismatchError" in capsys.readouterr().err


def test_a_server_of_nothing_is_wrong_use(model_words, capsys):
    assert main(["serve", *model_words]) == 2
    assert "--guardrail DIR, or --checkpoint M" in capsys.readouterr().err


def test_a_prompt_gate_is_served_by_command(gate, folder, model_words, tmp_path):
    gate.save_pretrained(tmp_path / "gate")
    with start(*model_words, "--guardrail", str(tmp_path / "gate"), str(folder / "guard")) as child:
        try:
            ready = read_ready(child)
            target = Target(ready["url"], ready["model"])
            reply = target.ask([{"role": "user", "content": TOPIC}], tokens=3, stream=False)
        finally:
            child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    assert (child.returncode, ready["guardrails"]) == (0, ["gate", "guard"])
    assert (reply.verdicts[0]["id"], reply.verdicts[0]["triggered"]) == ("gate", True)
