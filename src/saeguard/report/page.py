"""The report of a guardrail as one HTML page: no script, no network, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saeguard.errors import ArtifactError
from saeguard.guardrail import Guardrail
from saeguard.report import plots
from saeguard.report.formatting import lines, number, percent, visible
from saeguard.report.limits import limits
from saeguard.report.overlap import overlaps
from saeguard.report.template import filled, written
from saeguard.report.view import UNMEASURED, Share, alpha, chosen_summary, facts, feature_rows, gate_rows, model_name
from saeguard.rule import Rule

SUSPECTS = 10


def write_page(guardrail: Guardrail, path: str | Path, results: Mapping[str, Any] | None = None) -> Path:
    """Write the page; the path of it. Raises `ArtifactError` where it cannot be written.

    `results` (as `quickstart --json` prints them) adds answers at the top: `sets`, each with name, role, n,
    unguarded, guarded and trigger_rate; `examples`, each with prompt, unguarded, guarded and triggered; `chance`.
    """
    return written(render_page(guardrail, results), path, "the page", ArtifactError)


def render_page(guardrail: Guardrail, results: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    return filled(
        "page.html.j2",
        {"percent": percent, "number": number, "lines": lines, "visible": visible},
        unmeasured=UNMEASURED,
        model=model_name(guardrail),
        layer=guardrail.layer,
        rules=[_rule_context(guardrail, rule, f"r{i}") for i, rule in enumerate(guardrail.rules, 1)],
        results=None if results is None else _results_context(results),
    )


def _rule_context(guardrail: Guardrail, rule: Rule, scope: str) -> dict[str, Any]:
    gates, features = gate_rows(rule), feature_rows(rule)
    return {
        "name": visible(rule.name),
        "action": rule.action,
        "facts": facts(guardrail, rule),
        "gate": next((gate for gate in gates if gate.chosen), None),
        "gates": gates,
        "why": visible(rule.evidence.get("why_this_gate", "")),
        "alpha": alpha(rule),
        "features": features,
        "weighted": any(row.weight is not None for row in features),
        "explained": any(row.explanation for row in features),
        "contamination": _contamination_context(rule),
        "other_way": rule.evidence.get("threshold_other_way"),
        "overlaps": overlaps(rule),
        "limits": limits(rule),
        "plots": {name: Markup(plots.scoped(svg, scope)) for name, svg in _plots(rule).items()},
    }


def _plots(rule: Rule) -> dict[str, str]:
    """The plots for which the guardrail carries figures. They are SVG of our own making, escaped by matplotlib."""
    features = feature_rows(rule)
    made = {"heat_map": plots.heat_map(features)} if features else {}
    if summary := chosen_summary(rule):
        made["intervals"] = plots.intervals(gate_rows(rule)[0], alpha(rule))
        if summary["histograms"]["counts"]:
            made["histograms"] = plots.histograms(summary)
        if summary["curve"]:
            made["trade_off"] = plots.trade_off(rule.evidence["gates"], summary["gate"])
    return made


def _contamination_context(rule: Rule) -> dict[str, Any] | None:
    """Every document that was left out, and the nearest of the others."""
    found = rule.evidence.get("contamination")
    if not found:
        return None
    outliers = [entry for entry in found["listed"] if entry["outlier"]]
    others = [entry for entry in found["listed"] if not entry["outlier"]]
    return {**found, "outliers": outliers, "others": others[: max(0, SUSPECTS - len(outliers))]}


def _results_context(results: Mapping[str, Any]) -> dict[str, Any]:
    sets = results.get("sets", [])
    shares = {
        key: [Share.from_rate(entry["name"], entry[key], entry["n"]) for entry in sets]
        for key in ("unguarded", "guarded", "trigger_rate")
    }
    rows = list(zip([visible(entry["role"]) for entry in sets], *shares.values(), strict=True))
    chart = Markup(plots.accuracy(shares["unguarded"], shares["guarded"], results.get("chance"))) if sets else None
    return {"rows": rows, "chart": chart, "examples": results.get("examples", [])}
