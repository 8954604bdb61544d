"""Survival under relearning in `compare`: what is trained and asked, kept and removed, and folders copied together."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from conftest import make_model
from saeguard.attacks.config import AttackConfig
from saeguard.attacks.curves import Relearner
from saeguard.attacks.relearn_forget import ATTACK, RelearnForget
from saeguard.attacks.relearning import Lesson
from saeguard.baselines.catalogue import BASELINES
from saeguard.cli.main import main
from saeguard.corpus import Corpus
from saeguard.errors import EvaluationError
from saeguard.evaluation.comparison import Comparison
from saeguard.evaluation.harness import Settings, evaluate
from saeguard.evaluation.mcq import Question
from saeguard.evaluation.sources import QuestionSet, TextSet
from saeguard.evaluation.subject import Loader, Subject
from saeguard.evaluation.survival import OnTopic
from saeguard.evaluation.task import split
from saeguard.evaluation.tasks.multiple_choice import MultipleChoice, question_items
from saeguard.evaluation.tasks.tofu import Tofu
from saeguard.report.comparison_view import comparison_tables
from saeguard.report.evaluation_page import render_markdown, render_page
from test_baselines import files as files
from test_baselines import trial
from test_comparison import SETS, Stop, raising
from test_evaluation_tasks import tofu_folder
from topics import passages

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning"),
]
CONFIG = AttackConfig(documents=8, batch=4, max_tokens=24, learning_rate=1e-2)
GRIDS = {
    "conditional": {"n": (4,), "strength": (0.5,)},
    "prompt-refuse": {"alpha": (0.1,), "regularisation": (1.0, 10.0)},
    "grad-ascent": {"steps": (2,), "batch": (2,), "max_tokens": (16,), "check_every": (1,), "keep_utility": (0.0,)},
}
TASK = MultipleChoice(tuple(one for one in SETS if one.role != "near"))


@pytest.fixture
def relearn(files, tmp_path):
    return partial(RelearnForget.of, CONFIG, 2, str(files / "forget.jsonl"), tmp_path / "work" / "relearning")


@pytest.fixture
def comparison(files, llama, tokenizer, tmp_path, relearn):
    base = trial(files, llama, tokenizer, tmp_path, None, load=lambda: (copy.deepcopy(llama), tokenizer))
    methods = [replace(BASELINES[name], grid=grid) for name, grid in GRIDS.items()]
    loader = Loader(lambda: (copy.deepcopy(llama), tokenizer))
    return Comparison(loader, base, methods, 2, [TASK], [TASK], None, tmp_path / "work", relearn)


def test_every_method_is_asked_after_relearning_and_nothing_is_trained_twice(comparison, tmp_path):
    plain = replace(comparison, relearn=None).run(Settings(), 0.01)
    assert "relearning" not in plain["comparison"]
    found = comparison.run(Settings(), 0.01)
    topic = [item for item in split(TASK.items())[1].items if item.role == "topic"]
    for its in (found["comparison"]["relearning"]["control"], *_relearned(found).values()):
        assert its["accuracy"]["n"] == len(topic)
    assert found["comparison"]["relearning"]["lesson"]["documents"] == 8
    assert {its["epochs"] for its in _relearned(found).values()} == {2}
    assert list((tmp_path / "work" / "relearning").iterdir()) == []
    again = replace(comparison, trial=replace(comparison.trial, load=raising(Stop())))
    assert again.run(Settings(), 0.01) == found
    assert list((tmp_path / "work" / "relearning").iterdir()) == []
    without = {name: {k: v for k, v in its.items() if k != "relearned"} for name, its in _methods(found).items()}
    assert without == _methods(plain)


def test_a_guardrail_is_asked_as_in_the_attack(comparison, relearn, tmp_path, files):
    """The same digits as `attack relearn-forget`, whose points are made apart from this."""
    found = comparison.run(Settings(), 0.01)
    (folder,) = (tmp_path / "work" / "fitted").glob("conditional-*")
    texts = [TextSet("forget", "topic", Corpus.of("forget", "retain", str(files / "forget.jsonl")))]
    relearner = Relearner(CONFIG, texts, tmp_path / "attack", lambda _: None)
    subject = Subject.fitted("conditional", comparison.loader, str(folder))
    (point,) = relearner.points(ATTACK, subject, Lesson.taken("forget", texts, 8), 2)
    (run,) = evaluate(point.models, [OnTopic(TASK)], Settings())
    right = [sum(record.scores["accuracy"] for record in run.records[one.name]) for one in point.models]
    its = [found["comparison"]["relearning"]["control"], found["comparison"]["methods"]["conditional"]["relearned"]]
    assert [one["accuracy"]["value"] * one["accuracy"]["n"] for one in its] == pytest.approx(right)
    assert {record.triggered for record in run.records["conditional"]} == {True}


def test_a_checkpoint_is_trained_from_where_it_is(relearn, tokenizer, tmp_path):
    further = relearn(question_items(SETS))
    first, other = (Subject(f"m{seed}", _loader(seed, tokenizer)) for seed in (0, 1))
    before, after = (
        [_weights(one.loader) for one in its] for its in ((first, other), map(further.after, (first, other)))
    )
    moved, apart = (float((a - b).norm()) for a, b in ((after[1], before[1]), (after[1], before[0])))
    assert 0 < moved < apart / 2
    further.discard(other)
    assert len(list((tmp_path / "work" / "relearning").iterdir())) == 1
    assert torch.equal(_weights(further.after(other).loader), after[1])


def test_documents_in_which_a_question_stands_are_not_learned_from(files, relearn):
    texts = list(passages("forget", 90))
    fit = [one.text for one in Corpus.of("forget", "forget", texts).documents() if one.split == "fit"]
    asked = [question_items([QuestionSet("q", "topic", (Question(text, ("a", "b"), 0),))])[0] for text in fit]
    further = relearn(asked[1:])
    assert further.lesson.texts == fit[:1]
    assert further.about["lesson"]["questions_compared"] == len(asked) - 1
    with pytest.raises(EvaluationError, match="stands in each document of the forget text"):
        relearn(asked)


def test_of_tofu_only_the_authors_to_forget_are_asked(tmp_path):
    task = OnTopic(replace(Tofu(tofu_folder(tmp_path, each=6), whole=False), max_new_tokens=1))
    assert {item.domain for item in task.items()} == {"forget"}
    assert (task.name, task.settings, task.whole) == ("tofu", {"max_new_tokens": 1}, False)


def test_the_column_is_drawn_and_a_training_that_diverged_has_no_figure(comparison):
    result = comparison.run(Settings(), 0.01)
    result["comparison"]["methods"]["grad-ascent"]["relearned"] = {"epochs": 2, "failed": "a loss became NaN"}
    table = comparison_tables(result)[0]
    assert table["head"][1:3] == ["topic: right", "topic after 2 epochs of relearning: right"]
    assert [row[0] for row in table["rows"]] == ["unguarded", *GRIDS]
    assert [row[2] == "-" for row in table["short"]] == [False, False, False, True]
    for text in (render_page(result), render_markdown(result)):
        assert "topic after 2 epochs of relearning: right" in text
        assert "on 8 documents of the forget text" in text


def test_folders_of_several_comparisons_are_one_when_copied_together(files, tmp_path, capsys):
    """Whatever the methods and wherever the folders lie: the third run fits, trains and answers nothing."""
    for name in ("forget", "kitchen"):
        texts = passages(name, 24, words=8, seed=9)
        rows = [{"question": f"{t}?", "choices": t.split()[:4], "answer": i % 4} for i, t in enumerate(texts)]
        (files / f"{name}-q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    one, other = ["prompt-refuse", "grad-ascent"], ["conditional"]
    alone = [_compared(files, tmp_path / f"w{i}", its, capsys) for i, its in enumerate((one, other))]
    for i in range(2):
        shutil.copytree(tmp_path / f"w{i}", tmp_path / "both", dirs_exist_ok=True)
    before = _listing(tmp_path / "both")
    found = _compared(files, tmp_path / "both", [*one, *other], capsys)
    assert _listing(tmp_path / "both") == before
    assert found["comparison"]["methods"] == {**_methods(alone[0]), **_methods(alone[1])}
    assert found["comparison"]["relearning"] == alone[0]["comparison"]["relearning"]
    assert len(found["comparison"]["methods"]["conditional"]["failed"]) == 1
    assert [s["name"] for s in found["subjects"]] == ["unguarded", *one, *other]


def _compared(files, work, methods, capsys):
    given = {
        "--methods": methods, "--budget": [2], "--model": [files / "model"], "--sae": [files / "sae"], "--layer": [1],
        "--dtype": ["float32"], "--device": ["cpu"], "--forget": [files / "forget.jsonl"],
        "--retain": [f"{name}={files / name}.jsonl" for name in ("kitchen", "garden")],
        "--topic": [f"t={files / 'forget-q.jsonl'}"], "--far": [f"f={files / 'kitchen-q.jsonl'}"],
        "--relearn": [1], "--documents": [4], "--max-tokens": [24], "--work": [work],
        "--out": [work.with_suffix(".json")],
    }  # fmt: skip
    sets = [("prompt-refuse", "alpha=0.2"), ("prompt-refuse", "regularisation=1,10"), ("conditional", "n=4,200"),
            ("conditional", "strength=0.5"), ("grad-ascent", "steps=2"), ("grad-ascent", "batch=2"),
            ("grad-ascent", "max-tokens=16"), ("grad-ascent", "keep-utility=0"), ("grad-ascent", "learning-rate=1e-4"),
            ("grad-ascent", "lora-rank=0,2")]  # fmt: skip
    given["--set"] = [f"{method}.{its}" for method, its in sets if method in methods]
    words = [str(word) for name, values in given.items() for word in (name, *values)]
    assert main(["compare", *words, "--force", "--no-costs", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _methods(result):
    return result["comparison"]["methods"]


def _relearned(result):
    return {name: its["relearned"] for name, its in _methods(result).items()}


def _loader(seed, tokenizer) -> Loader:
    model = make_model("llama", seed=seed)
    return Loader(lambda: (model, tokenizer))


def _weights(loader: Loader) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in loader.loaded[0].parameters()])
