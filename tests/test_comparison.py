"""`compare`: equal budgets, chosen on dev, reported on test, the same file after a stop, and what it shows."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from saeguard.baselines import settings
from saeguard.baselines.catalogue import BASELINES, Cost
from saeguard.cli.compare import methods_of
from saeguard.cli.main import main
from saeguard.cli.options import add_fields, config_of, words_of
from saeguard.errors import (
    BaselineError,
    DoesNotFitError,
    EvaluationError,
    ModelError,
    NonFiniteLossError,
    SAEMismatchError,
    SelectionError,
)
from saeguard.evaluation.comparison import Comparison, drawn
from saeguard.evaluation.fitted import is_its_own
from saeguard.evaluation.harness import Settings
from saeguard.evaluation.result import write_result
from saeguard.evaluation.sources import QuestionSet
from saeguard.evaluation.subject import Loader
from saeguard.evaluation.task import split
from saeguard.evaluation.tasks.multiple_choice import MultipleChoice
from saeguard.evaluation.tasks.open import OpenAnswers
from saeguard.evaluation.tasks.tofu import Tofu
from saeguard.report.comparison_view import comparison_tables
from saeguard.report.evaluation_page import render_markdown, render_page
from test_baselines import files as files
from test_baselines import trial
from test_evaluation import questions
from test_evaluation_tasks import tofu_folder
from topics import passages

GRIDS = {
    "conditional": {"n": (2, 4, 200), "strength": (0.5, 2.0)},
    "prompt-refuse": {"alpha": (0.1, 0.2), "regularisation": (1.0, 10.0)},
}
"""The third n is more features than there are: that configuration cannot be fitted."""
SETS = tuple(
    QuestionSet(name, role, questions(topic, 14))
    for name, role, topic in (("topic", "topic", "forget"), ("near", "near", "kitchen"), ("far", "far", "garden"))
)


class Stop(Exception):
    """Ends a comparison in its middle."""


@pytest.fixture
def comparison(files, llama, tokenizer, tmp_path):
    """Two methods with small grids, the fit measured in this process."""
    base = trial(files, llama, tokenizer, tmp_path, None)
    methods = [replace(BASELINES[name], grid=grid) for name, grid in GRIDS.items()]
    topic = tuple(one for one in SETS if one.role != "near")
    near = tuple(one for one in SETS if one.role == "near")
    tuning = [MultipleChoice(topic), MultipleChoice(near, "near")]

    def measure(baseline, chosen) -> Cost:
        return baseline.run(replace(base, settings=chosen, out=tmp_path / f"alone-{baseline.name}"))

    loader = Loader(lambda: (llama, tokenizer))
    return Comparison(loader, base, methods, 6, tuning, [*tuning, OpenAnswers(SETS, 4)], measure, tmp_path / "work")


def test_all_have_one_budget_and_the_result_shows_everything(comparison):
    result = comparison.run(Settings(), 0.01)
    methods = result["comparison"]["methods"]
    assert {name: method["configurations"] for name, method in methods.items()} == {
        "conditional": 6,
        "prompt-refuse": 4,
    }
    assert [len(methods["conditional"]["failed"]), len(methods["prompt-refuse"]["failed"])] == [2, 0]
    assert "SelectionError" in methods["conditional"]["failed"][0]["why"]
    assert [one["name"] for one in result["subjects"]] == ["unguarded", *GRIDS]
    assert result["settings"]["split"] == "test"
    for method in methods.values():
        assert method["fit"]["seconds"] > 0
        assert method["bytes"] > 0
        assert method["run"]["ms_per_token"] > 0
    quality, cost, tried = comparison_tables(result)
    assert [row[0] for row in quality["rows"]] == ["unguarded", *GRIDS]
    assert "topic: refused" in quality["head"]
    assert [len(row) for row in cost["rows"]] == [8, 8]
    assert len(tried["rows"]) == 10
    page, markdown = render_page(result), render_markdown(result)
    for text in ("Compared: conditional, prompt-refuse", "What they cost", "SelectionError"):
        assert text in page
        assert text in markdown


def test_a_comparison_that_is_stopped_goes_on_and_gives_the_same_file(comparison, tmp_path):
    measured = []

    def stopping(baseline, chosen) -> Cost:
        measured.append(baseline.name)
        if len(measured) == 2:
            raise Stop
        return comparison.measure(baseline, chosen)

    assert "fit" not in replace(comparison, measure=None).run(Settings(), 0.01)["comparison"]["methods"]["conditional"]
    with pytest.raises(Stop):
        replace(comparison, measure=stopping).run(Settings(), 0.01)
    fitted = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "fitted").iterdir()}
    for name in ("a", "b"):
        write_result(comparison.run(Settings(), 0.01), tmp_path / name)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "fitted").iterdir()} == fitted
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def raising(error):
    """A `load` that fails: what asks for the model to fit something meets it."""

    def load():
        raise error

    return load


def test_what_cannot_be_fitted_is_not_tried_again(comparison):
    comparison = replace(comparison, tasks=comparison.tuning, measure=None)
    first = comparison.run(Settings(), 0.01)
    assert len(first["comparison"]["methods"]["conditional"]["failed"]) == 2
    again = replace(comparison, trial=replace(comparison.trial, load=raising(Stop())))
    assert again.run(Settings(), 0.01) == first


def test_what_the_machine_lacked_is_tried_again(comparison):
    comparison = replace(comparison, tasks=comparison.tuning, measure=None)
    broken = replace(comparison, trial=replace(comparison.trial, load=raising(ModelError("cannot load the model"))))
    with pytest.raises(EvaluationError, match="no configuration of conditional could be fitted: ModelError"):
        broken.run(Settings(), 0.01)
    assert len(comparison.run(Settings(), 0.01)["comparison"]["methods"]["conditional"]["failed"]) == 2


@pytest.mark.parametrize(
    ("kind", "cause", "kept"),
    [
        (BaselineError, None, True),
        (NonFiniteLossError, None, True),
        (SelectionError, None, True),
        (BaselineError, OSError("disk full"), False),
        (BaselineError, ImportError("peft"), False),
        (DoesNotFitError, None, False),
        (SAEMismatchError, None, False),
    ],
)
def test_a_failure_is_the_settings_own_by_its_type(kind, cause, kept):
    error = kind("why")
    error.__cause__ = cause
    assert is_its_own(error) == kept


def test_a_method_of_which_nothing_can_be_fitted_is_told_of_beside_the_others(comparison):
    hopeless = replace(BASELINES["conditional"], grid={"n": (100, 200)})
    both = replace(comparison, methods=[hopeless, comparison.methods[1]], measure=None)
    result = both.run(Settings(), 0.01)
    assert [one["name"] for one in result["subjects"]] == ["unguarded", "prompt-refuse"]
    assert [row["setting"] for row in result["comparison"]["unfitted"]["conditional"]] == [{"n": 100}, {"n": 200}]
    quality, _, tried = comparison_tables(result)
    assert "could be fitted: conditional." in quality["note"]
    assert [row[1] for row in tried["rows"] if row[0] == "conditional"] == ["n 100", "n 200"]
    assert "SelectionError" in render_page(result)
    with pytest.raises(EvaluationError, match="no configuration of conditional could be fitted"):
        replace(comparison, methods=[hopeless]).run(Settings(), 0.01)


def test_what_is_drawn_from_a_grid_is_always_the_same_and_varies_every_axis():
    one = BASELINES["static"]
    four = drawn(one, 4)
    assert four == drawn(one, 4)
    assert len(four) == 4
    assert all(len({setting[axis] for setting in four}) > 1 for axis in one.grid)
    assert len(drawn(one, 100)) == 8


def test_options_say_what_settings_say():
    assert words_of(settings.Static()) == [
        "--n",
        "20",
        "--retain-rate",
        "0.01",
        "--clamp",
        "active",
        "--strength",
        "0.5",
    ]
    assert "--encoder" not in words_of(settings.Prompted())


@pytest.mark.parametrize("baseline", BASELINES.values(), ids=lambda baseline: baseline.name)
def test_settings_are_what_their_options_say(baseline):
    parser = argparse.ArgumentParser()
    add_fields(parser, baseline.settings)
    assert config_of(baseline.settings, parser.parse_args(words_of(baseline.settings()))) == baseline.settings()


def test_the_command_measures_in_a_process_of_its_own(files, tmp_path, capsys):
    for name in ("forget", "kitchen"):
        texts = passages(name, 24, words=8, seed=9)
        rows = [{"question": f"{t}?", "choices": t.split()[:4], "answer": i % 4} for i, t in enumerate(texts)]
        (files / f"{name}-questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    words = [
        "compare", "--methods", "prompt-refuse", "--budget", "1", "--set", "alpha=0.2", "--model",
        files / "model", "--dtype", "float32", "--device", "cpu", "--forget", files / "forget.jsonl", "--retain",
        f"kitchen={files / 'kitchen.jsonl'}",
        f"garden={files / 'garden.jsonl'}", "--topic", f"t={files / 'forget-questions.jsonl'}", "--far",
        f"f={files / 'kitchen-questions.jsonl'}", "--out", tmp_path / "r.json", "--page", tmp_path / "r.html", "--json",
    ]  # fmt: skip
    assert main(list(map(str, words))) == 0
    result = json.loads(capsys.readouterr().out)
    found = result["comparison"]["methods"]["prompt-refuse"]
    assert found["fit"]["peak_memory_mb"] > 100
    assert [point["setting"]["alpha"] for point in found["points"]] == [0.2]
    assert "What they cost" in (tmp_path / "r.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "0"], "at least one configuration"),
        (["--forget", "x"], "go together"),
        (["--model", "m"], "--sae is needed"),
        (["--tofu", "d", "--benchmark", "starter"], "in the place of questions"),
        (["--relearn", "0"], "expected a number of epochs from 1 on"),
        (["--set", "steps"], r"expected [METHOD.]NAME=VALUE"),
        (["--methods", "static", "--set", "learning-rate=1e-4"], "none of the methods has it"),
        (["--methods", "static", "--set", "npo.n=3"], "none of the methods has it"),
        (["--methods", "static", "--set", "n=few"], "invalid int value"),
    ],
)
def test_wrong_use_is_named(words, message, capsys):
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_values_that_are_set_take_the_place_of_the_grids():
    args = SimpleNamespace(methods=["npo", "simnpo", "static"], grid="small", set=[])
    args.set = ["learning-rate=1e-4,3e-4", "n=5", "npo.beta=0.5", "simnpo.learning-rate=1"]
    npo, simnpo, static = methods_of(args)
    assert npo.grid == {**BASELINES["npo"].grid, "learning_rate": [1e-4, 3e-4], "beta": [0.5]}
    assert simnpo.grid == {**BASELINES["simnpo"].grid, "learning_rate": [1.0]}
    assert static.grid == {**BASELINES["static"].grid, "n": [5]}


def test_all_is_every_method():
    found = methods_of(SimpleNamespace(methods=["npo", "all"], grid="small", set=[]))
    assert [one.name for one in found] == list(BASELINES)


def test_tofu_is_chosen_on_one_side_and_reported_on_the_other(comparison, tmp_path):
    pytest.importorskip("rouge_score")
    task = replace(Tofu(tofu_folder(tmp_path, each=12), whole=False), max_new_tokens=4)
    result = replace(comparison, tuning=[task], tasks=[task], measure=None).run(Settings(), 0.01)
    dev, test = split(task.items())
    assert {record["item"] for record in result["records"]} == {item.id for item in test.items}
    points = result["comparison"]["methods"]["prompt-refuse"]["points"]
    assert {point["accuracy"]["topic"]["n"] for point in points} == {sum(item.role == "topic" for item in dev.items)}
    head = comparison_tables(result)[0]["head"]
    assert {"topic: right", "topic: ROUGE", "model utility"} <= set(head)
    for record in result["records"]:
        if record["subject"] == "prompt-refuse":
            assert record["scores"]["refused"] == record["triggered"]
            assert not (record["scores"]["refused"] and record["scores"]["accuracy"])
