"""The reports: everything in them, nothing that calls out, nothing that escapes."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from saeguard.calibration import Rate
from saeguard.clamp import Clamp
from saeguard.errors import ArtifactError
from saeguard.gate import Cusum, Density, Evidence, Gate, Probe
from saeguard.guardrail import Guardrail, merge
from saeguard.report import print_report, write_page
from saeguard.report.limits import limits
from saeguard.report.overlap import overlaps
from saeguard.report.page import render_page
from saeguard.report.view import facts, feature_rows, gate_rows, percent, visible
from saeguard.rule import Rule
from saeguard.sae.slim import SlimEncoder
from saeguard.sample import FORGET
from saeguard.selection import SelectedFeature

HOSTILE = '<script>alert("x")</script> $\\frac{$ {{ 7 * 7 }} & \x1b[31m[bold]\u202e'
IDS = (812345, 7, 1999, 60417)
CORPORA = ("arts", "near physics", HOSTILE)


def _rates(hits: int, n: int) -> dict[str, Any]:
    return Rate(hits, n).as_dict()


def _summary(kind: str, threshold: float, method: dict[str, Any]) -> dict[str, Any]:
    edges = [float(i) for i in range(11)]
    return {
        "gate": kind,
        "threshold": threshold,
        "method": method,
        "bounds": [{"group": name, "n": 40, "value": float(i)} for i, name in enumerate(CORPORA)],
        "caught": _rates(26, 30),
        "caught_in_calibration": _rates(40, 45),
        "delay_in_calibration": 0.4,
        "false_positives": {name: _rates(i, 20) for i, name in enumerate(CORPORA)},
        "by_length": {"256": {"caught": _rates(20, 21), "false_positives": _rates(2, 40)},
                      "48": {"caught": _rates(6, 9), "false_positives": _rates(1, 20)}},
        "auroc": 0.97,
        "curve": [
            {"threshold": t, "caught": 1 - t / 20, "mean_false": 1 - t / 10, "worst_false": 1 - t / 11} for t in edges
        ],
        "histograms": {"edges": edges, "counts": {name: [3, 0, 1, 0, 0, 0, 2, 0, 0, 1] for name in (FORGET, *CORPORA)}},
    }  # fmt: skip


def _evidence(chosen: str, method: dict[str, Any]) -> dict[str, Any]:
    passage = {"corpus": HOSTILE, "activation": 3.25, "before": "the pale\n", "token": " moon", "after": HOSTILE}
    suspect = {"corpus": "arts", "document": 3, "score": 1.5, "text": f"suspect {HOSTILE}", "outlier": True}
    return {
        "chosen": chosen,
        "why_this_gate": "it is the one",
        "gates": {kind: _summary(kind, 5.5, method) for kind in ("density", "evidence", "probe")},
        "corpora": {},
        "windows": {"calibration": 60, "fit": 120, "test": 90},
        "contamination": {"rule": "stated", "retain_bound": 1.0, "forget_bound": -1.0, "quarantined": 1,
                          "listed": [suspect, suspect | {"outlier": False, "text": "a near one"}]},
        "threshold_other_way": {"quarantine": False, "threshold": 8.125, "caught": _rates(3, 30)},
        "passages": {str(j): [passage] for j in IDS},
        "topk": {"mode": "threshold", "agreement": 0.93, "active": 10, "tokens": 100},
    }  # fmt: skip


SCORERS = {
    "density": Density(),
    "evidence": Evidence(torch.tensor([1.5, -0.5, 0.25, 2.0]), -0.1),
    "probe": Probe(torch.ones(8), 0.0),
}


def _guardrail(chosen: str = "evidence", name: str = "astronomy", method: dict[str, Any] | None = None) -> Guardrail:
    rates = {FORGET: 0.2, "arts": 0.01, "near physics": 0.05, HOSTILE: 0.0}
    rule = Rule(
        name=name,
        selected=tuple(SelectedFeature(j, 3.5, 0.5, 7.0, rates) for j in IDS),
        encoder=SlimEncoder(torch.zeros(8, 4), torch.zeros(4), torch.zeros(4)),
        decoder=torch.zeros(4, 8),
        gate=Gate(SCORERS[chosen], Cusum(0.5)),
        threshold=5.5,
        clamp=Clamp("dense", 200.0, 2.0),
        evidence=_evidence(chosen, method or {"kind": "conformal", "alpha": 0.05}),
    )
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8}
    sae = {"source": HOSTILE, "fingerprint": "abc", "activation": "ReLU", "d_sae": 32}
    head = {
        "layer": 1,
        "hook": "resid_post",
        "hook_out": "resid_post",
        "tokenizer": "t",
    }
    return Guardrail(
        **head,
        model={"name": HOSTILE, "config": config, "weights": "def"},
        sae=sae,
        rules=(rule,),
        versions={"saeguard": "0.1.0"},
    )


def _overlapping() -> Guardrail:
    """One whose topic overlaps with two of its three retain corpora."""
    guardrail = _guardrail()
    shares = {FORGET: _rates(1, 64), "arts": _rates(1, 64), "near physics": _rates(2, 64), HOSTILE: _rates(12, 64)}
    guardrail.evidence["contamination"] |= {"shares": shares, "forget_among_retain": _rates(20, 64)}
    for bound, hits in zip(guardrail.evidence["gates"]["evidence"]["bounds"], (25, 14, 4), strict=True):
        bound["caught"] = hits
    return guardrail


def _results() -> dict[str, Any]:
    sets = [
        {"name": "astronomy", "role": "topic", "n": 100, "unguarded": 0.58, "guarded": 0.26, "trigger_rate": 0.97},
        {"name": HOSTILE, "role": "far", "n": 50, "unguarded": 0.6, "guarded": 0.6, "trigger_rate": 0.0},
    ]
    examples = [{"prompt": f"ask {HOSTILE}", "unguarded": "yes\nindeed", "guarded": HOSTILE, "triggered": True}]
    return {"sets": sets, "examples": examples, "chance": 0.25}


def _printed(guardrail: Guardrail) -> str:
    buffer = io.StringIO()
    print_report(guardrail, Console(file=buffer, width=240, color_system=None))
    return buffer.getvalue()


class _Reader(HTMLParser):
    """Tags with attributes, and the text outside <style>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "use"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module", params=["density", "evidence", "probe"])
def page(request: pytest.FixtureRequest) -> str:
    return render_page(_guardrail(request.param), _results())


def test_page_refers_to_nothing_outside_itself(page: str) -> None:
    reader = _Reader(page)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "action")]
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "http" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_page_is_well_nested_and_its_ids_are_unique(page: str) -> None:
    reader = _Reader(page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert reader.open == []
    assert len(ids) == len(set(ids)) > 0


def test_page_references_resolve_to_ids_in_it(page: str) -> None:
    ids = set(re.findall(r' id="([^"]+)"', page))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)) != set()
    assert {one or two for one, two in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)} <= ids


def test_page_escapes_hostile_text(page: str) -> None:
    assert "<script" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "{{ 7 * 7 }}" in page
    assert _Reader(page).text.count(visible(HOSTILE)) >= 8


def test_page_holds_features_corpora_plots_results_and_limits(page: str) -> None:
    text = _Reader(page).text
    assert page.count("<svg") == 5
    figures = ("near physics", "moon", "26 of 30", "58 %", "a near one", "8.125", "it is the one")
    for expected in (*map(str, IDS), *figures):
        assert expected in text
    assert "yes\nindeed" in text
    assert "does not remove anything" in text
    assert len(page.encode()) < 500_000


def test_page_without_results_has_no_results_section() -> None:
    assert 'id="results"' not in render_page(_guardrail())
    assert 'id="results"' in render_page(_guardrail(), {"examples": []})


def test_every_rule_of_a_merged_guardrail_is_shown() -> None:
    merged = merge([_guardrail(name="astronomy"), _guardrail("probe", name="weapons")])
    page = render_page(merged)
    reader = _Reader(page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert {"rule-1", "rule-2"} <= set(ids)
    assert len(ids) == len(set(ids))
    assert page.count("<svg") == 8
    printed = _printed(merged)
    assert "astronomy" in printed
    assert "weapons" in printed


def test_a_guardrail_without_figures_says_so() -> None:
    bare = _guardrail()
    bare = replace(bare, rules=(replace(bare.rule, evidence={}),))
    assert "carries no figures" in render_page(bare)
    assert "no figures from held-out text" in _printed(bare)


def test_page_is_the_same_bytes_each_time_and_is_written(tmp_path: Path) -> None:
    written = write_page(_guardrail(), tmp_path / "deep" / "page.html", _results())
    assert written.read_text("utf-8") == render_page(_guardrail(), _results())


def test_page_that_cannot_be_written_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write the page"):
        write_page(_guardrail(), tmp_path / "file" / "page.html")


@pytest.mark.parametrize("chosen", ["density", "evidence", "probe"])
def test_terminal_report_prints_every_corpus_feature_and_gate(chosen: str) -> None:
    printed = _printed(_guardrail(chosen))
    names = (FORGET, *map(visible, CORPORA), *map(str, IDS), *SCORERS)
    for expected in (*names, "86.7 %", "it is the one"):
        assert expected in printed
    assert "\x1b" not in printed
    assert "\u202e" not in printed


def test_features_of_negative_weight_are_marked_as_not_clamped() -> None:
    rows = feature_rows(_guardrail("evidence").rule)
    assert [row.clamped for row in rows] == [True, False, True, True]
    assert [row.rank for row in rows] == [1, 2, 3, 4]
    assert rows[0].worst_retain == ("near physics", 0.05)
    assert rows[0].tokens == ("moon",)


def test_worst_corpus_and_mean_are_over_retain_corpora_only() -> None:
    gate = gate_rows(_guardrail().rule)[0]
    assert gate.worst is not None
    assert gate.worst.name == visible(HOSTILE)
    assert gate.mean_false == pytest.approx((0 + 1 + 2) / 60)
    assert [length for length, _, _ in gate.by_length] == ["48", "256"]


def test_the_corpus_that_asks_for_the_highest_threshold_comes_first() -> None:
    gate = gate_rows(_guardrail().rule)[0]
    assert [share.name for share in gate.false_positives] == [visible(name) for name in reversed(CORPORA)]


def test_the_limits_say_what_long_text_does_where_it_was_counted() -> None:
    rule = _guardrail().rule
    assert not any("long text" in sentence for sentence in limits(rule))
    counted = {"arts": {"alarms": 0.0, "tokens": 2000, "per_1000": 0.0},
               HOSTILE: {"alarms": 1.0, "tokens": 4000, "per_1000": 0.25}}  # fmt: skip
    rule.evidence["gates"]["evidence"]["false_alarms"] = counted
    (sentence,) = (sentence for sentence in limits(rule) if "long text" in sentence)
    assert visible(HOSTILE) in sentence
    assert "0.25 false alarms in 1,000 tokens" in sentence
    assert "63.2 % of conversations of 4,000 tokens" in sentence


def test_overlaps_name_the_corpora_and_the_worst_first() -> None:
    rule = _overlapping().rule
    topic, contaminated, *near = overlaps(rule)
    assert topic.startswith("31.2 % of the documents (20 of 64) of the topic read like retain text")
    assert contaminated.startswith(f"18.8 % of the documents (12 of 64) of {visible(HOSTILE)} read like the topic")
    assert "in held-out text 10 % of its windows trigger" in contaminated
    assert contaminated.endswith(f"fit with --near-retain {visible(HOSTILE)}.")
    assert [sentence.split(" from the topic: ")[1][:42] for sentence in near] == [
        f"at 5 % of {visible(HOSTILE)} it catches 13.3 %"[:42], "at 5 % of near physics it catches 46.7 % of"[:42]
    ]  # fmt: skip
    assert not any("arts" in sentence for sentence in overlaps(rule))
    rule.evidence["threshold_other_way"]["quarantine"] = True
    assert "were kept, so that they raise the threshold" in overlaps(rule)[1]


def test_overlaps_are_in_the_page_and_in_the_terminal_and_only_where_there_are_any() -> None:
    for shown in (_Reader(render_page(_overlapping())).text, _printed(_overlapping())):
        for sentence in overlaps(_overlapping().rule):
            assert sentence in " ".join(shown.split())
    for shown in (render_page(_guardrail()), _printed(_guardrail())):
        assert "topic and retain text overlap" not in shown


def test_percentile_threshold_promises_no_alpha() -> None:
    guardrail = _guardrail("density", method={"kind": "percentile", "p_dyn": 95.0})
    assert "95th percentile" in dict(facts(guardrail, guardrail.rule))["Threshold"]
    assert not any("promise" in sentence for sentence in limits(guardrail.rule))
    assert "α =" not in render_page(guardrail)


def test_a_given_threshold_is_said_to_be_given() -> None:
    guardrail = _guardrail("density", method={"kind": "fixed", "threshold": -1.0})
    assert "given, not calibrated" in dict(facts(guardrail, guardrail.rule))["Threshold"]
    assert not any("no gate" in sentence for sentence in limits(guardrail.rule))
    assert any("no gate" in sentence for sentence in limits(replace(guardrail.rule, threshold=-1.0)))


@pytest.mark.parametrize(("action", "says"), [("clamp", "not make the model refuse"), ("monitor", "blocks nothing")])
def test_limits_depend_on_the_action(action: Any, says: str) -> None:
    guardrail = _guardrail()
    rule = replace(guardrail.rule, action=action)
    assert any(says in sentence for sentence in limits(rule))


@pytest.mark.parametrize(("value", "text"), [(0.0, "0 %"), (0.0001, "<0.1 %"), (0.0667, "6.7 %"), (1.0, "100 %")])
def test_percent(value: float, text: str) -> None:
    assert percent(value) == text
