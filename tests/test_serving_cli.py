"""The commands: a server in a process of its own, from its start to SIGTERM, and the benchmark that loads one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from conftest import make_sae
from saeguard.cli.bench_serve import read_ready
from saeguard.cli.main import main
from saeguard.serving.load import Target
from topics import passages, save_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, tokenizer) -> Path:
    """A tiny model, and under `guard` a guardrail fitted on it."""
    folder = tmp_path_factory.mktemp("serve")
    assert (
        main(
            [
                *save_all(folder, llama, tokenizer, make_sae("jumprelu")),
                "--name",
                "topic",
                "--out",
                str(folder / "guard"),
            ]
        )
        == 0
    )
    return folder


@pytest.fixture
def words(folder) -> list[str]:
    return [
        "--guardrail",
        str(folder / "guard"),
        "--model",
        str(folder / "model"),
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]


def test_from_start_to_sigterm(words, tmp_path):
    (tmp_path / "keys").write_text("one\n", "utf-8")
    command = [
        sys.executable,
        "-m",
        "saeguard.cli.main",
        "serve",
        *words,
        "--port",
        "0",
        "--json",
        "--served-name",
        "m",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            ready = read_ready(child)
            target = Target(ready["url"], ready["model"])
            reply = target.ask([{"role": "user", "content": passages("forget", 1)[0]}], tokens=3, stream=False)
            again = target.ask([{"role": "user", "content": passages("kitchen", 1)[0]}], tokens=3, stream=True)
        finally:
            child.send_signal(signal.SIGTERM)
        _, log = child.communicate(timeout=60)
    assert child.returncode == 0
    assert (ready["model"], ready["guardrails"]) == ("m", ["guard"])
    assert (reply.status, reply.whole, again.whole) == (200, True, True)
    assert reply.verdicts[0]["triggered"]
    assert again.verdicts[0]["id"] == "guard"
    assert [json.loads(line)["event"] for line in log.splitlines()] == ["ready", "request", "request", "stopped"]


def test_wrong_use_is_named(words, capsys, tmp_path):
    for more, status, message in (
        (["--action", "nope=clamp"], 2, "expected ID=ACTION"),
        (["--api-keys-file", str(tmp_path / "none")], 2, "api-keys-file"),
        (["--host", "not a host"], 1, "cannot listen"),
    ):
        assert main(["serve", *words, *more]) == status
        assert message in capsys.readouterr().err


def test_a_guardrail_of_another_model_is_refused(folder, words, capsys, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in (folder / "model").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.5 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert main(["serve", *words, "--model", str(other)]) == 1
    assert "ArtifactMismatchError" in capsys.readouterr().err


def test_a_server_under_load_answers_as_alone(words, capsys):
    capsys.readouterr()
    more = ["--clients", "6", "--minutes", "0.12", "--cases", "5", "--pairs", "1", "--json"]
    assert main(["bench", "serve", *words, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["requests"] > 10
    assert {name: found[name] for name in ("lost", "crossed", "wrong_verdicts", "near_threshold", "other_text")} == {
        "lost": 0, "crossed": 0, "wrong_verdicts": 0, "near_threshold": 0, "other_text": 0,
    }  # fmt: skip
    assert found["nuisances"] > 0
    assert found["mistreated_nuisances"] == {}
    assert found["guarded_share"] > 0
