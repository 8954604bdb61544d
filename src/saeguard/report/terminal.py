"""The report of a guardrail for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from saeguard.guardrail import Guardrail
from saeguard.report.formatting import number, percent, visible
from saeguard.report.limits import limits
from saeguard.report.overlap import overlaps
from saeguard.report.view import UNMEASURED, FeatureRow, GateRow, alpha, facts, feature_rows, gate_rows, model_name
from saeguard.rule import Rule

SUSPECTS = 8


def print_report(guardrail: Guardrail, console: Console) -> None:
    """Print what the guardrail is, its features, and how it does on held-out text; each rule of a merged one."""
    console.print(Text(f"Guardrail for {model_name(guardrail)}, layer {guardrail.layer}", style="bold"))
    for rule in guardrail.rules:
        console.rule(Text(visible(rule.name), style="bold"), align="left")
        _print_facts(guardrail, rule, console)
        gates = gate_rows(rule)
        if gates and gates[0].chosen:
            _print_rates(gates[0], alpha(rule), console)
            _print_overlaps(rule, console)
            _print_lengths(gates[0], console)
        if gates:
            _print_gates(gates, str(rule.evidence.get("why_this_gate", "")), console)
        _print_features(feature_rows(rule), console)
        _print_contamination(rule, console)
        _heading("What it does not do", console)
        for sentence in limits(rule):
            console.print(Padding(Text(f"- {sentence}"), (0, 0, 0, 2)))


def _print_facts(guardrail: Guardrail, rule: Rule, console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in facts(guardrail, rule):
        table.add_row(label, Text(value))
    console.print(table)


def _print_rates(gate: GateRow, level: float | None, console: Console) -> None:
    promise = "" if level is None else f" (alpha = {level:g})"
    _heading(f"Held-out windows that trigger{promise}", console)
    table = _table("corpus", "role", "triggered", "of", "share", "95 % interval")
    if not gate.caught.n:
        console.print(Padding(Text(f"Topic caught: {UNMEASURED}."), (0, 0, 0, 2)))
    measured = [("forget", gate.caught)] if gate.caught.n else []
    for role, share in [*measured, *(("retain", share) for share in gate.false_positives)]:
        style = "bold" if role == "forget" else "yellow" if level is not None and share.rate > level else ""
        cells = (share.name, role, str(share.hits), str(share.n), share.percent, share.interval)
        table.add_row(*map(Text, cells), style=style)
    console.print(table)


def _print_overlaps(rule: Rule, console: Console) -> None:
    said = overlaps(rule)
    if said:
        _heading("Where topic and retain text overlap", console)
    for sentence in said:
        console.print(Padding(Text(f"! {sentence}", style="yellow"), (0, 0, 0, 2)))


def _print_lengths(gate: GateRow, console: Console) -> None:
    _heading("By length", console)
    table = _table("window of up to", "topic caught", "95 % interval", "false positives", "95 % interval")
    for length, caught, wrong in gate.by_length:
        table.add_row(f"{length} tokens", caught.percent, caught.interval, wrong.percent, wrong.interval)
    console.print(table)


def _print_gates(gates: list[GateRow], why: str, console: Console) -> None:
    _heading("Gates side by side", console)
    table = _table("gate", "threshold", "caught", "95 % interval", "false, mean", "false, worst", "AUROC")
    for gate in gates:
        worst = "-" if gate.worst is None else f"{gate.worst.percent} {gate.worst.name}"
        name = f"{gate.kind} (in use)" if gate.chosen else gate.kind
        cells = (
            name, number(gate.threshold), gate.caught.percent, gate.caught.interval, percent(gate.mean_false), worst,
            number(gate.auroc),
        )  # fmt: skip
        table.add_row(*map(Text, cells), style="bold" if gate.chosen else "")
    console.print(table)
    if why:
        console.print(Padding(Text(f"Why this gate: {visible(why)}."), (0, 0, 0, 2)))


def _print_features(features: list[FeatureRow], console: Console) -> None:
    _heading("Features in rank order", console)
    table = _table("#", "id", "forget", "retain", "ratio", "fires on topic", "fires most elsewhere", "strongest tokens")
    weighted = any(row.weight is not None for row in features)
    if weighted:
        table.add_column("weight", justify="right")
    explained = any(row.explanation for row in features)
    if explained:
        table.add_column("explanation", overflow="fold")
    for row in features:
        chosen, (corpus, rate) = row.feature, row.worst_retain
        cells = [
            str(row.rank), str(chosen.id), number(chosen.forget_score), number(chosen.retain_score),
            number(chosen.ratio), row.forget_rate, f"{percent(rate)} {corpus}", " | ".join(row.tokens),
        ]  # fmt: skip
        cells += [f"{row.weight:+.2f}"] if row.weight is not None else []
        cells += [row.explanation] if explained else []
        table.add_row(*map(Text, cells), style="" if row.clamped else "dim")
    console.print(table)
    if any(row.weight is not None and row.weight <= 0 for row in features):
        console.print(
            Padding(
                Text("Features of weight 0 or below (dim) speak against the topic and are not clamped."), (0, 0, 0, 2)
            )
        )


def _print_contamination(rule: Rule, console: Console) -> None:
    found = rule.evidence.get("contamination")
    if not found:
        return
    _heading("Texts that look like the other side", console)
    console.print(
        Padding(
            Text(f"{found['quarantined']} documents left out of fitting and calibration. Rule: {found['rule']}."),
            (0, 0, 0, 2),
        )
    )
    table = _table("corpus", "document", "score", "left out", "text")
    outliers = sum(entry["outlier"] for entry in found["listed"])
    for entry in found["listed"][: max(SUSPECTS, outliers)]:
        cells = (
            visible(entry["corpus"]),
            str(entry["document"]),
            number(entry["score"]),
            "yes" if entry["outlier"] else "no",
        )
        table.add_row(*map(Text, cells), Text(visible(entry["text"]), no_wrap=True, overflow="ellipsis"))
    console.print(table)


def _heading(text: str, console: Console) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _table(*columns: str) -> Table:
    """A light table; all but the first and textual columns are numbers, to the right."""
    left = {"corpus", "role", "gate", "text", "strongest tokens", "false, worst", "fires most elsewhere", "left out"}
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table
