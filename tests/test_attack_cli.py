"""`attack` as a user runs it, on a tiny model: the card, going on after a stop, bounds, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chat_server import serving
from conftest import make_guardrail, make_sae
from saeguard.attacks import campaign
from saeguard.attacks.config import FAMILIES
from saeguard.clamp import Clamp
from saeguard.cli.main import main
from saeguard.evaluation.mcq import Question, answer_questions
from topics import passages

SMALL = ("--limit", 12, "--others", 2, "--lengths", 50, 2000, "--steps", 1, "--budget", 20000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, llama, tokenizer) -> Path:
    """Model, texts and questions that it answers right as files, and a guardrail that acts on nearly everything."""
    folder = tmp_path_factory.mktemp("attack")
    llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    clamp = Clamp("dense", c=60.0, strength=8.0)
    guardrail = make_guardrail(llama, tokenizer, make_sae("jumprelu"), 1, threshold=0.05, clamp=clamp)
    guardrail.save_pretrained(folder / "guard")
    for name in ("forget", "kitchen", "garden"):
        asked = [Question(f"{t}?", tuple(t.split()[:4]), 0) for t in passages(name, 60, words=8, seed=9)]
        answers = answer_questions(llama, tokenizer, asked)
        rows = [
            {"question": q.text, "choices": q.choices, "answer": a.chosen} for q, a in zip(asked, answers, strict=True)
        ]
        (folder / f"{name}-questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        its = [json.dumps({"text": text}) + "\n" for text in passages(name, 20)]
        (folder / f"{name}.jsonl").write_text("".join(its), "utf-8")
    return folder


@pytest.fixture
def run(folder, capsys, tmp_path):
    """Run `attack` on the folder's model, guardrail and questions."""

    def run(*words: object, given: bool = True) -> tuple[int, Any, str]:
        model = ["--model", folder / "model", "--dtype", "float32", "--device", "cpu"]
        roles = {"topic": "forget", "near": "kitchen", "far": "garden"}
        its = [w for role, name in roles.items() for w in (f"--{role}", f"{name}={folder / name}-questions.jsonl")]
        its += ["--near-text", f"kitchen={folder / 'kitchen.jsonl'}", "--far-text", f"garden={folder / 'garden.jsonl'}"]
        its += ["--guardrail", f"mine={folder / 'guard'}", *SMALL, "--out", tmp_path / "card.json"]
        status = main(["attack", *map(str, [*words, *model, *(its if given else [])])])
        out, err = capsys.readouterr()
        return status, json.loads(out) if "--json" in words and out else out, err

    return run


def without_times(card: dict[str, Any]) -> dict[str, Any]:
    for row in card["rows"]:
        row["cost"].pop("seconds")
    return card


def test_all_attacks_make_one_card(run, tmp_path):
    status, card, err = run("all", "--json")
    assert status == 0, err
    assert {row["family"] for row in card["rows"]} == set(FAMILIES) - {"relearning"}
    out = {one["attack"]: one["why"] for one in card["left_out"]}
    assert "takes long" in out["relearn-related"]
    assert out["paraphrase"] == "it needs a language model: --endpoint URL"
    assert "do not fit into the model's 1024" in out["dilution-before-ordinary-2000"]
    assert "Not made: paraphrase" in err
    removed = next(row for row in card["rows"] if row["attack"] == "hook-removed")
    assert (removed["success"]["value"], removed["n"]) == (1.0, removed["blocked"])
    refused = next(row for row in card["rows"] if row["attack"] == "quantised-4")
    assert "weights of the model: found" in refused["note"]
    (counts,) = card["blocked"]
    assert {row["blocked"] for row in card["rows"]} == {counts["blocked"]}
    assert all(row["n"] <= row["tried"] <= row["blocked"] for row in card["rows"])
    page, text = (tmp_path / "card.html").read_bytes(), (tmp_path / "card.md").read_text("utf-8")
    rows = [row for row in card["rows"] if row["success"]]
    strong = [row for row in rows if min(row["success"]["low"], row["kept"]["interval"][0]) > row["chance"]]
    assert text.count("(at chance)") == sum(
        not row["n"] or row["kept"]["interval"][0] <= row["chance"] for row in card["rows"]
    )
    assert page.count(b'class="n over"') == len(strong)
    assert "Nothing in a guardrail of this kind can prevent that" in text
    assert all(f"| {row['attack']} |" in text for row in card["rows"])
    cells = [str(counts[name]) for name in ("right", "known", "blocked", "left_out")]
    assert f"| mine | {' | '.join(cells)} |" in text
    status, shown, _ = run("--render", tmp_path / "card.json", given=False)
    assert (status, "What cannot be held" in shown) == (0, True)
    assert (tmp_path / "card.html").read_bytes() == page


def test_only_known_questions_are_attacked(run, tmp_path):
    run("spelling-capitals")
    card = json.loads((tmp_path / "card.json").read_text("utf-8"))
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for record in card["records"]:
        if record["role"] == "topic":
            scores.setdefault((record["attack"], record["subject"]), {})[record["item"]] = record["scores"]["accuracy"]
    clean, guarded = scores["clean", "unguarded"], scores["clean", "mine"]
    without = scores["no-question", "unguarded"]
    assert set(without) == set(clean)
    assert ("no-question", "mine") not in scores
    wrong = {item for item in clean if clean[item] and not guarded[item]}
    attacked = {item for item in wrong if not without[item]}
    assert 0 < len(attacked) < len(wrong)
    assert set(scores["spelling-capitals", "mine"]) == attacked
    (counts,) = card["blocked"]
    assert (counts["blocked"], counts["left_out"]) == (len(attacked), len(wrong - attacked))


def test_a_run_that_was_stopped_goes_on(run, tmp_path, monkeypatch):
    names = ("spelling", "hook-removed")
    whole = without_times(run(*names, "--json")[1])
    for path in (tmp_path / "card.work").iterdir():
        path.unlink()
    begun = []
    evaluate = campaign.evaluate

    def counted(subjects, tasks, *args, **kwargs):
        begun.append(tasks[0].name)
        if len(begun) == 5:
            raise KeyboardInterrupt
        return evaluate(subjects, tasks, *args, **kwargs)

    monkeypatch.setattr(campaign, "evaluate", counted)
    status, _, err = run(*names, "--json")
    assert (status, "run the same command to go on" in err) == (130, True)
    kept = {path: path.read_bytes() for path in (tmp_path / "card.work").iterdir()}
    assert len(kept) == 7
    status, card, _ = run(*names, "--json")
    assert (status, without_times(card)) == (0, whole)
    assert {path: path.read_bytes() for path in kept} == kept


def test_no_attack_is_begun_after_the_time_is_up(run):
    status, card, _ = run("spelling", "--minutes", 0, "--json")
    assert (status, card["rows"]) == (0, [])
    assert {one["why"] for one in card["left_out"]} == {"the 0 minutes were up: run again to go on"}


def test_an_endpoint_is_asked(run):
    with serving() as server:
        words = ("paraphrase", "--endpoint", server.url, "--endpoint-model", "small", "--json")
        status, card, _ = run(*words)
        assert (status, [row["attack"] for row in card["rows"]]) == (0, ["paraphrase"])
        assert card["rows"][0]["cost"]["calls"] == 1
        asked = len(server.asked)
        assert run(*words)[0] == 0
        assert len(server.asked) == asked


def test_a_checkpoint_is_attacked_beside(run, folder):
    status, card, _ = run("split-2", "--checkpoint", f"copy={folder / 'model'}", "--json")
    assert status == 0
    rows = {row["subject"]: row for row in card["rows"]}
    assert rows["copy"]["blocked"] == 0
    assert rows["copy"]["success"] is None
    assert rows["mine"]["blocked"] > 0


def test_attacks_are_listed(run):
    status, found, _ = run("--list", "--json", given=False)
    assert (status, set(found)) == (0, set(FAMILIES))
    assert "split-3" in found["splitting"]
    assert "spelling-rot13" in run("--list", given=False)[1]


@pytest.mark.parametrize(
    ("words", "given", "status", "message"),
    [
        (["spelin"], True, 2, "there is no attack spelin"),
        (["all"], False, 2, "and --guardrail DIR"),
        ([], True, 2, "expected the names of attacks"),
        (["paraphrase"], True, 2, "it needs a language model: --endpoint URL"),
        (["paraphrase", "--endpoint", "http://127.0.0.1:9/v1"], True, 1, "EndpointError"),
        (["--render", "nowhere.json"], False, 1, "cannot read the result"),
    ],
)
def test_mistakes_are_named(run, words, given, status, message):
    found, _, err = run(*words, given=given)
    assert (found, message in err, "Traceback" in err) == (status, True, False)


def test_where_nothing_is_blocked_there_is_nothing_to_attack(run, folder, tmp_path, llama, tokenizer):
    quiet = make_guardrail(llama, tokenizer, make_sae("jumprelu"), 1, threshold=9.0)
    quiet.save_pretrained(folder / "quiet")
    words = ("spelling", "--guardrail", folder / "quiet", "--out", tmp_path / "card.json")
    status, _, err = run(*words, given=False)
    assert (status, "there is nothing to attack" in err) == (1, True)
