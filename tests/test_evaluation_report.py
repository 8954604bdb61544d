"""The report of an evaluation: one file with everything in it, the same figures everywhere, nothing that escapes."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from saeguard.errors import EvaluationError
from saeguard.report.evaluation_limits import limits
from saeguard.report.evaluation_page import render_markdown, render_page, write_report
from saeguard.report.evaluation_terminal import print_evaluation
from saeguard.report.evaluation_view import change, sections

HOSTILE = '<script>alert("x")</script> | {{ 7 * 7 }} $\\frac{$ \x1b[31m\u202e'
VOID = {"meta", "br", "path", "use", "rect", "hr"}


def estimate(value: float, n: int) -> dict[str, float]:
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": n}


def figure(
    task: str, measure: str, role: str, domain: str | None, before: float, after: float, **more: Any
) -> dict[str, Any]:
    found = {"value": after - before, "low": after - before - 0.1, "high": after - before + 0.1, "p": 0.01, "n": 40}
    return {
        "task": task, "measure": measure, "kind": "rate", "sense": "knowledge", "role": role, "domain": domain,
        "estimates": {"unguarded": estimate(before, 40), HOSTILE: estimate(after, 40)},
        "differences": {HOSTILE: {**found, "test": "exact McNemar"}}, **more,
    }  # fmt: skip


def triggered(task: str, role: str, value: float) -> dict[str, Any]:
    row = figure(task, "triggered", role, "stars", 0, value, sense="neutral", differences={})
    return {**row, "estimates": {HOSTILE: estimate(value, 40)}}


@pytest.fixture
def result() -> dict[str, Any]:
    """A result of two subjects in which everything that comes from outside is hostile."""
    model = {"name": HOSTILE, "weights": "abc", "config": {"model_type": "llama"}}
    subject = {"model": model, "tokenizer": "t", "dtype": "float32", "device": "cpu"}
    rule = {"name": HOSTILE, "gate": "probe", "threshold": 5.0, "action": "clamp", "features": 4, "clamp": {"c": 3.0}}
    example = {
        "task": "open", "domain": HOSTILE, "role": "topic", "triggered": True, "prompt": HOSTILE, "reference": HOSTILE,
        "answers": {"unguarded": "plain", HOSTILE: HOSTILE},
    }  # fmt: skip
    measures = [{"name": "accuracy", "kind": "rate", "meaning": "share right", "sense": "knowledge", "columns": []}]
    task = {"settings": {"form": "cloze"}, "whole": False, "n": 80, "repeated": 1, "filtered": 2, "items": "i"}
    curve = {"auroc": estimate(0.9, 80), "points": [[0.0, 0.0], [0.1, 0.8], [1.0, 1.0]]}
    bars = [{"role": role, "domain": HOSTILE, "n": 4, "above": 1, "counts": [3, 1]} for role in ("topic", "near")]
    point = {"accuracy": {role: estimate(0.5, 20) for role in ("topic", "near", "far")}, "kept": estimate(0.6, 40)}
    point["triggered"] = point["accuracy"]
    return {
        "format_version": 1, "code": "c", "versions": {"torch": "2"},
        "settings": {"split": "test", "limit": 5, "keep_text": True, "seed": 0},
        "subjects": [{"name": "unguarded", **subject}, {"name": HOSTILE, "guardrail": "g", **subject}],
        "guardrails": {HOSTILE: [rule]},
        "tasks": [{"name": name, "by_role": {"topic": 40, "near": 40, "far": 0}, "measures": measures, **task}
                  for name in ("mcq", "near", "open")],
        "figures": [
            figure("mcq", "accuracy", "topic", "stars", 0.6, 0.2), figure("near", "accuracy", "near", None, 0.7, 0.4),
            figure("near", "accuracy", "near", HOSTILE, 0.7, 0.4), figure("mcq", "accuracy", "far", "law", 0.5, 0.5),
            figure("open", "match", "topic", "stars", 0.4, 0.1), triggered("mcq", "topic", 0.9),
            figure("open", "gibberish", "topic", "stars", 0.0, 0.6, sense="harm"), triggered("near", "near", 0.3),
        ],
        "gates": [{"task": "mcq", "subject": HOSTILE, "threshold": 5.0, "edges": [0.0, 4.0, 8.0], "histograms": bars,
                   "curves": {"near": curve, "far": curve}}],
        "fit_text": {HOSTILE: "f"},
        "duplicates": [{"task": "mcq", "domain": HOSTILE, "item": "1", "corpus": HOSTILE}],
        "shared": [{"task": "mcq", "domain": "law", "item": "2", "corpus": HOSTILE}],
        "examples": [example],
        "records": [],
        "sweep": {"axes": {"n": [10, 20]}, "chosen": 1, "rule": "A rule.", "note": "",
                  "points": [{"setting": {"n": n}, **point} for n in (10, 20)]},
    }  # fmt: skip


class Checker(HTMLParser):
    """Collects tags and text, and fails on a tag that closes another."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_closed_file_without_script_or_address(result):
    html = render_page(result)
    page = Checker()
    page.feed(html)
    assert page.open == []
    assert "script" not in page.tags
    assert not re.search(r'(src|href)="(?!#)', html)
    assert "@import" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "{{ 7 * 7 }}" in page.text
    assert page.tags.count("svg") == 6


def test_ids_are_unique(result):
    ids = re.findall(r'\bid="([^"]*)"', render_page(result))
    assert len(ids) == len(set(ids))


def test_harm_to_neighbours_comes_first_and_is_marked(result):
    found = sections(result)
    assert [section.role for section in found] == ["near", "topic", "far"]
    assert found[0].rows[0].harmful
    assert not found[2].rows[0].harmful
    by_measure = {row.measure: row for row in found[1].rows}
    assert not by_measure["accuracy"].harmful
    assert by_measure["gibberish"].harmful


def test_every_table_has_n_and_intervals(result):
    text = render_markdown(result)
    rows = [line for line in text.splitlines() if line.startswith("| mcq | accuracy")]
    assert rows
    assert all("| 40 |" in row and " to " in row for row in rows)


def test_page_markdown_and_terminal_show_the_same_figures(result):
    page, console = Checker(), Console(file=io.StringIO(), width=300)
    page.feed(render_page(result))
    print_evaluation(result, console)
    markdown, printed = render_markdown(result), console.file.getvalue()
    for shown in ("60 %", "20 %", "-40 points, p = 0.01", "-30 points, p = 0.01"):
        assert all(shown in text for text in (page.text, markdown, printed)), shown


def test_the_same_result_gives_the_same_page(result):
    assert render_page(result) == render_page(result)


def test_the_limits_are_said_in_words(result):
    said = " ".join(limits(result))
    for words in ("4 of 40 questions", "12 of 40 questions", "10 % of the topic's open answers", "60 % of answers",
                  "removes nothing from the weights"):  # fmt: skip
        assert words in said


def test_a_test_without_neighbours_says_so(result):
    for task in result["tasks"]:
        task["by_role"]["near"] = 0
    result["tasks"] = [task for task in result["tasks"] if task["name"] != "near"]
    assert any("has not been tested" in sentence for sentence in limits(result))


def test_no_change_is_called_none():
    assert change("rate", {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}) == "none"
    assert change("mean", {"value": -0.25, "low": -1.0, "high": 0.0, "p": 0.0001}) == "-0.25, p < 0.001"


def test_a_report_that_cannot_be_written_is_named(result, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(EvaluationError, match="cannot write the report"):
        write_report(result, tmp_path / "file" / "page.html")


def test_the_name_says_which_kind(result, tmp_path):
    assert write_report(result, tmp_path / "a.md").read_text("utf-8").startswith("# ")
    assert write_report(result, tmp_path / "a.html").read_text("utf-8").startswith("<!doctype html>")
