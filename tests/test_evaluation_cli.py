"""`eval`, `sweep` and `sequence` as a user runs them, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import make_sae
from saeguard import Guardrail
from saeguard.cli.main import main
from saeguard.evaluation.joining import joined
from saeguard.evaluation.result import read_result
from topics import LAYER, passages, save_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, tokenizer) -> Path:
    """Model, SAE, texts and questions as files, and a guardrail under `guard`."""
    folder = tmp_path_factory.mktemp("eval")
    command = save_all(folder, llama, tokenizer, make_sae("jumprelu"))
    assert main([*command, "--name", "topic", "--out", str(folder / "guard")]) == 0
    for name in ("forget", "kitchen", "garden"):
        texts = passages(name, 24, words=8, seed=9)
        rows = [{"question": f"{t}?", "choices": t.split()[:4], "answer": i % 4} for i, t in enumerate(texts)]
        (folder / f"{name}-questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


@pytest.fixture
def run(folder, capsys, tmp_path):
    """Run a judging command on the folder's model and questions."""
    roles = {"topic": "forget", "near": "kitchen", "far": "garden"}
    questions = [w for role, name in roles.items() for w in (f"--{role}", f"{name}={folder / name}-questions.jsonl")]

    def run(command: str, *words: object, sources: bool = True) -> tuple[int, Any, str]:
        model = ["--model", folder / "model", "--dtype", "float32", "--device", "cpu"]
        status = main([command, *map(str, model), *(questions if sources else []), *map(str, words)])
        out, err = capsys.readouterr()
        return status, json.loads(out) if "--json" in words and out else out, err

    return run


def test_eval_judges_a_guardrail_and_draws_the_result_again(run, folder, tmp_path):
    texts = ["--topic-text", f"stars={folder / 'forget.jsonl'}", "--far-text", f"oven={folder / 'kitchen.jsonl'}"]
    words = ["--guardrail", f"mine={folder / 'guard'}", *texts, "--fit-text", f"book={folder / 'forget.jsonl'}",
             "--max-new-tokens", 4, "--keep-text", "--out", tmp_path / "r.json",
             "--page", tmp_path / "a.html"]  # fmt: skip
    status, result, _ = run("eval", *words, "--json")
    assert status == 0
    assert [subject["name"] for subject in result["subjects"]] == ["unguarded", "mine"]
    assert {task["name"] for task in result["tasks"]} == {"mcq", "near", "open", "perplexity"}
    held_out = next(task for task in result["tasks"] if task["name"] == "perplexity")
    assert (held_out["by_role"]["topic"] > 0, result["duplicates"]) == (True, [])
    status, shown, _ = run("eval", "--render", tmp_path / "r.json", "--page", tmp_path / "b.html",
                           "--markdown", tmp_path / "b.md", sources=False)  # fmt: skip
    assert status == 0
    assert "Neighbouring topics" in shown
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert "# What mine forgets" in (tmp_path / "b.md").read_text("utf-8")


def test_eval_again_gives_the_same_file(run, folder, tmp_path):
    words = ["--guardrail", folder / "guard", "--tasks", "mcq", "near"]
    for name in ("a", "b"):
        assert run("eval", *words, "--out", tmp_path / f"{name}.json")[0] == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.work").is_dir()


def test_eval_judges_a_checkpoint_beside(run, folder, tmp_path):
    same = f"copy={folder / 'model'}"
    status, result, _ = run("eval", "--checkpoint", same, "--tasks", "mcq", "--out", tmp_path / "r.json", "--json")
    assert status == 0
    assert all(f["differences"]["copy"]["value"] == 0 for f in result["figures"])


def test_results_made_apart_are_drawn_as_those_made_together(run, folder, tmp_path):
    parts = {"mine": ["--guardrail", f"mine={folder / 'guard'}"], "copy": ["--checkpoint", f"copy={folder / 'model'}"]}
    tasks = ["--tasks", "mcq", "near"]
    for name, words in {**parts, "both": [word for its in parts.values() for word in its]}.items():
        assert run("eval", *words, *tasks, "--out", tmp_path / f"{name}.json")[0] == 0
    apart, together = ([read_result(tmp_path / f"{name}.json") for name in names] for names in (parts, ["both"]))
    assert joined(apart) == together[0]
    words = [tmp_path / f"{name}.json" for name in parts]
    status, shown, _ = run("eval", "--render", *words, "--markdown", tmp_path / "apart.md", sources=False)
    assert status == 0
    assert "mine" in shown
    assert "copy" in (tmp_path / "apart.md").read_text("utf-8")


def test_results_of_other_items_or_of_one_name_are_not_drawn_as_one(run, folder, tmp_path):
    words = ["--guardrail", f"mine={folder / 'guard'}", "--tasks", "mcq"]
    for name, limit in (("few", 3), ("more", 6)):
        assert run("eval", *words, "--limit", limit, "--out", tmp_path / f"{name}.json")[0] == 0
    few, more = (tmp_path / f"{name}.json" for name in ("few", "more"))
    for files, says in (((few, more), "differ in settings, tasks"), ((few, few), "two of the results have a subject")):
        status, _, error = run("eval", "--render", *files, sources=False)
        assert (status, says in error) == (1, True), error


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--tasks", "muse"], 2, "needs --muse DIR"),
        (["--topic", "x=y.jsonl"], 1, "no such file"),
        (["--tasks", "perplexity"], 2, "needs texts"),
        (["--checkpoint", "nameless"], 2, "expected NAME=FILE"),
        (["--guardrail", "nowhere"], 1, "ArtifactError"),
        (["--render", "nowhere.json"], 1, "cannot read the result"),
        (["--near", "forget=forget-questions.jsonl"], 1, "no such file"),
    ],
)
def test_mistakes_are_named(run, tmp_path, words, status, message):
    found, _, err = run("eval", "--tasks", "mcq", *words, "--out", tmp_path / "r.json")
    assert (found, message in err, "Traceback" in err) == (status, True, False)


def test_eval_lists_its_tasks(run):
    assert set(run("eval", "--list", "--json")[1]) >= {"mcq", "near", "open", "perplexity", "muse", "tofu", "mtbench"}
    assert "lm-eval" in run("eval", "--list")[1]


def test_sweep_chooses_on_dev_and_reports_test(run, folder, tmp_path):
    words = [
        "--at", f"{LAYER}={folder / 'sae'}", "--forget", folder / "forget.jsonl", "--retain",
        f"kitchen={folder / 'kitchen.jsonl'}", f"garden={folder / 'garden.jsonl'}", "--gate", "density", "--n", 2, 4,
        "--alpha", 0.4, "--p-ratio", 50, "--fraction", 0.8, 1, "--force", "--out", tmp_path / "best", "--page",
        tmp_path / "sweep.html",
    ]  # fmt: skip
    status, result, _ = run("sweep", *words, "--json")
    assert status == 0
    sweep = result["sweep"]
    assert len(sweep["points"]) == 4
    assert result["settings"]["split"] == "test"
    least = sweep["unguarded"]["value"] - 0.01
    chosen = sweep["points"][sweep["chosen"]]
    keeping = [point for point in sweep["points"] if point["kept"]["value"] >= least]
    assert all(chosen["accuracy"]["topic"]["value"] <= point["accuracy"]["topic"]["value"] for point in keeping)
    assert len(Guardrail.from_pretrained(tmp_path / "best").features) == chosen["setting"]["n"]
    html = (tmp_path / "sweep.html").read_text("utf-8")
    assert "Forgetting against utility on dev items" in html
    assert "Along fraction" in html
    folders = list((tmp_path / "best.work" / "guardrails").iterdir())
    before = {path: path.stat().st_mtime_ns for path in folders}
    assert run("sweep", *words, "--json")[1] == result
    assert {path: path.stat().st_mtime_ns for path in folders} == before
    assert len(list((tmp_path / "best.work" / "shards").iterdir())) == 2


def test_a_sweep_of_nothing_is_refused(run, folder, tmp_path):
    status, _, err = run("sweep", "--at", f"{LAYER}={folder / 'sae'}", "--out", tmp_path / "x")
    assert (status, "nothing to sweep" in err) == (2, True)


def test_sequence_judges_after_every_step(run, folder, tmp_path):
    words = [
        "--sae", folder / "sae", "--layer", LAYER, "--forget", f"forget={folder / 'forget.jsonl'}",
        f"kitchen={folder / 'kitchen.jsonl'}", "--retain", f"garden={folder / 'garden.jsonl'}",
        f"kitchen={folder / 'kitchen.jsonl'}", "--n", 4, "--p-ratio", 50, "--alpha", 0.4, "--lengths", 128,
        "--gate", "density", "--no-chat", "--force", "--out", tmp_path / "both",
    ]  # fmt: skip
    status, result, err = run("sequence", *words, "--json")
    assert status == 0, err
    assert [subject["name"] for subject in result["subjects"]] == ["unguarded", "1: forget", "2: kitchen"]
    assert [rule.name for rule in Guardrail.from_pretrained(tmp_path / "both").rules] == ["forget", "kitchen"]
    assert {f["domain"] for f in result["figures"] if f["role"] == "topic"} >= {"forget", "kitchen"}
    status, _, err = run("sequence", *(str(w).replace("kitchen=", "attic=") for w in words))
    assert (status, "no questions on attic" in err) == (2, True)
