"""The command line: help, exit statuses, and the whole way from texts to a conversation on a tiny model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import make_sae
from saeguard import Guardrail
from saeguard.cli.main import COMMANDS, main
from topics import LAYER, passages, save_all


class Result:
    """What a command printed and returned."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def saeguard(capsys):
    """Run a command in this process."""

    def run(*words: object) -> Result:
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, tokenizer) -> Path:
    """Model, SAE and texts as files, and under `guard` a guardrail fitted on them by the command."""
    folder = tmp_path_factory.mktemp("cli")
    command = save_all(folder, llama, tokenizer, make_sae("jumprelu"))
    assert main([*command, "--name", "topic", "--out", str(folder / "guard")]) == 0
    return folder


@pytest.fixture
def model(folder) -> list[object]:
    return ["--model", folder / "model", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def texts(folder) -> list[object]:
    return ["--forget", folder / "forget.jsonl", "--retain", f"kitchen={folder / 'kitchen.jsonl'}"]


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_has_an_example(self, saeguard, command):
        said = saeguard(command, "--help")
        assert said.status == 0
        assert f"example:\n  saeguard {command}" in said.out
        assert "--json" in said.out

    def test_the_program_names_its_commands(self, saeguard):
        said = saeguard("--help")
        assert said.status == 0
        assert all(command in said.out for command in COMMANDS)

    def test_the_installed_program_is_this_one(self):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "saeguard.cli.main", "bench", "--list"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert "overhead" in done.stdout

    def test_bench_lists_its_benchmarks(self, saeguard):
        said = saeguard("bench", "--list")
        assert said.status == 0
        assert all(name in said.out for name in ("overhead", "fit"))


class TestWrongUse:
    @pytest.mark.parametrize(
        "words",
        [
            [], ["unheard-of"], ["fit"], ["inspect"], ["generate", "--guardrail", "guard"], ["merge", "--out", "x"],
            ["bench"], ["bench", "unheard-of"], ["bench", "overhead"], ["inspect", "guard", "--unheard-of"],
        ],
    )  # fmt: skip
    def test_exits_2(self, saeguard, words):
        said = saeguard(*words)
        assert said.status == 2
        assert said.err
        assert "Traceback" not in said.err

    @pytest.mark.parametrize(
        ("retain", "message"), [("no-name.txt", "NAME=FILE"), ("a=", "NAME=FILE"), ("=b", "NAME=FILE")]
    )
    def test_a_retain_corpus_without_a_name(self, saeguard, model, retain, message, tmp_path):
        said = saeguard("fit", *model, "--forget", "f.txt", "--retain", retain, "--out", tmp_path / "out")
        assert (said.status, message in said.err) == (2, True)

    def test_a_retain_corpus_named_twice(self, saeguard, tmp_path):
        said = saeguard("fit", "--forget", "f.txt", "--retain", "a=b.txt", "a=c.txt", "--out", tmp_path / "out")
        assert (said.status, "given twice" in said.err) == (2, True)

    def test_a_model_without_an_sae(self, saeguard, model, texts, tmp_path):
        said = saeguard("fit", *model, *texts, "--out", tmp_path / "out")
        assert (said.status, "--sae is needed" in said.err) == (2, True)


class TestFailedWork:
    def failed(self, said: Result, error: str) -> None:
        """Status 1, and one line that names the error."""
        line = said.err.strip().splitlines()[-1]
        assert said.status == 1
        assert error in line
        assert "Traceback" not in said.err
        assert said.out == ""

    def test_a_missing_guardrail(self, saeguard, tmp_path):
        said = saeguard("inspect", tmp_path / "nothing")
        self.failed(said, "ArtifactError")
        assert len(said.err.strip().splitlines()) == 1

    def test_a_missing_text(self, saeguard, model, folder, tmp_path):
        self.failed(saeguard("fit", *model, "--sae", folder / "sae", "--forget", tmp_path / "no.txt",
                             "--retain", f"kitchen={folder / 'kitchen.jsonl'}", "--out", tmp_path / "out"),
                    "CorpusError: no such file")  # fmt: skip

    def test_a_missing_model(self, saeguard, folder, tmp_path):
        said = saeguard("generate", "--guardrail", folder / "guard", "--model", tmp_path / "no-model", "Hello")
        self.failed(said, "ModelError")

    def test_a_layer_of_another_sae(self, saeguard, model, texts, folder, tmp_path):
        said = saeguard("fit", *model, *texts, "--sae", folder / "sae", "--layer", LAYER - 1, "--out", tmp_path / "out")
        self.failed(said, "SAEMismatchError")

    def test_a_folder_that_is_no_sae(self, saeguard, model, texts, folder, tmp_path):
        self.failed(saeguard("fit", *model, *texts, "--sae", folder, "--out", tmp_path / "out"), "SAEError")

    def test_two_rules_of_one_name(self, saeguard, folder, tmp_path):
        self.failed(saeguard("merge", folder / "guard", folder / "guard", "--out", tmp_path / "both"), "MergeError")
        assert not (tmp_path / "both").exists()


class TestTheWholeWay:
    def test_fit_says_how_good_the_guardrail_is(self, saeguard, folder, llama, tokenizer, tmp_path):
        command = save_all(tmp_path, llama, tokenizer, make_sae("jumprelu"))
        said = saeguard(*command, "--name", "topic", "--out", tmp_path / "guard", "--json")
        assert said.status == 0
        assert said.json["artifact"] == str(tmp_path / "guard")
        assert set(said.json["false_positives"]) == {"kitchen", "garden"}
        assert said.json["overlaps"] == []
        assert said.json["features"] == list(Guardrail.from_pretrained(folder / "guard").features)

    def test_inspect_prints_a_table(self, saeguard, folder):
        said = saeguard("inspect", folder / "guard")
        assert said.status == 0
        assert all(word in said.out for word in ("topic", "kitchen", "garden"))

    def test_inspect_prints_json(self, saeguard, folder):
        found = saeguard("inspect", folder / "guard", "--json").json
        guardrail = Guardrail.from_pretrained(folder / "guard")
        assert found["layer"] == LAYER
        assert [feature["id"] for feature in found["rules"][0]["features"]] == list(guardrail.features)
        assert found["rules"][0]["threshold"] == guardrail.threshold

    def test_inspect_writes_a_page(self, saeguard, folder, tmp_path):
        page = tmp_path / "page.html"
        said = saeguard("inspect", folder / "guard", "--page", page, "--json")
        assert said.status == 0
        assert said.json["layer"] == LAYER
        html = page.read_text("utf-8")
        assert "<html" in html
        assert all(name in html for name in ("topic", "kitchen", "garden"))
        assert 'src="http' not in html

    def test_generate_compares(self, saeguard, folder, model):
        topic, other = passages("forget", 1, seed=5)[0], passages("kitchen", 1, seed=5)[0]
        said = saeguard("generate", "--guardrail", folder / "guard", *model, "--compare", "--json",
                        "--max-new-tokens", 8, topic, other)  # fmt: skip
        assert said.status == 0
        assert [row["prompt"] for row in said.json] == [topic, other]
        for row in said.json:
            assert row["verdict"]["rule"] == "topic"
            assert row["verdict"]["triggered"] or row["guarded"] == row["unguarded"]

    def test_generate_shows_verdicts_to_people(self, saeguard, folder, model):
        prompt = "[red] and [/bold] are plain text"
        said = saeguard("generate", "--guardrail", folder / "guard", *model, "--max-new-tokens", 4, prompt)
        assert said.status == 0
        assert prompt in said.out
        assert "triggered topic:" in said.out

    def test_merge_then_chat(self, saeguard, folder, model, tmp_path, monkeypatch, llama, tokenizer):
        command = save_all(tmp_path, llama, tokenizer, make_sae("jumprelu"))
        assert saeguard(*command, "--name", "second", "--gate", "density", "--out", tmp_path / "second").status == 0
        merged = saeguard("merge", folder / "guard", tmp_path / "second", "--out", tmp_path / "both", "--json")
        assert merged.json == {"artifact": str(tmp_path / "both"), "rules": ["topic", "second"]}
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{passages('forget', 1)[0]}\nmilen tarno?\n\nnever read\n"))
        said = saeguard("chat", "--guardrail", tmp_path / "both", *model, "--max-new-tokens", 6, "--json")
        assert said.status == 0
        decoder, rest, turns = json.JSONDecoder(), said.out.strip(), []
        while rest:
            turn, end = decoder.raw_decode(rest)
            turns.append(turn)
            rest = rest[end:].strip()
        assert len(turns) == 2
        assert all({"answer", "verdict"} == set(turn) for turn in turns)

    def test_chat_ends_with_its_input(self, saeguard, folder, model, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("milen tarno selu"))
        said = saeguard("chat", "--guardrail", folder / "guard", *model, "--max-new-tokens", 4)
        assert said.status == 0

    def test_a_second_fit_uses_the_shards_of_the_first_unless_told_not_to(self, saeguard, llama, tokenizer, tmp_path):
        command = [*save_all(tmp_path, llama, tokenizer, make_sae("jumprelu")), "--out", tmp_path / "guard", "--json"]

        def shards() -> dict[str, int]:
            return {path.name: path.stat().st_ino for path in (tmp_path / "guard.work").rglob("*.safetensors")}

        assert saeguard(*command).status == 0
        first = shards()
        assert saeguard(*command).status == 0
        assert shards() == first != {}
        times = {path: path.stat().st_mtime_ns for path in (tmp_path / "guard.work").rglob("*.safetensors")}
        assert saeguard(*command, "--no-resume").status == 0
        assert all(path.stat().st_mtime_ns > before for path, before in times.items())


def test_train_sae_saves_an_sae_with_a_card_that_fit_takes(saeguard, folder, model, tmp_path):
    named = [f"{name}={folder / name}.jsonl" for name in ("forget", "kitchen", "garden")]
    said = saeguard("train-sae", *model, "--layer", LAYER, "--text", *named, "--tokens", 6000, "--width", 64, "--k", 6,
                    "--token-passes", 20_000, "--batch", 256, "--out", tmp_path / "sae", "--json")  # fmt: skip
    assert said.status == 0
    assert said.json["explained_variance"] > 0.3
    assert f"layer {LAYER}" in (tmp_path / "sae" / "README.md").read_text("utf-8")
    texts = ["--forget", folder / "forget.jsonl", "--retain", *named[1:]]
    small = ["--n", 4, "--p-ratio", 50, "--alpha", 0.2, "--lengths", 128]
    fitted = saeguard("fit", *model, "--sae", tmp_path / "sae", *texts, *small, "--out", tmp_path / "guard", "--json")
    assert (fitted.status, Guardrail.from_pretrained(tmp_path / "guard").layer) == (0, LAYER)
