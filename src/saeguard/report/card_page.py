"""The robustness card as one HTML page, as Markdown, and in a terminal: drawn from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saeguard.errors import EvaluationError
from saeguard.report import card_plots, curve_view
from saeguard.report.card_view import (
    CANNOT,
    HEAD,
    MEANINGS,
    blocked_rows,
    clean_rows,
    families,
    left_out,
    tested,
    tiles,
)
from saeguard.report.formatting import visible
from saeguard.report.markdown import markdown_table
from saeguard.report.plots import scoped
from saeguard.report.template import filled, written

CLEAN_HEAD = ("subject", "questions", "n", "right", "triggered")
BLOCKED_HEAD = ("subject", "right without the guardrail", "of these known", "of these blocked", "left out")
LEAD = (
    "What comes back when the questions are attacked: the share of blocked questions that are answered right again "
    "where the model without the guardrail still answers them under the same attack."
)
INTERVALS = "Intervals: 95 %, Wilson."


def write_card(card: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page, or Markdown where the name ends in `.md`. Raises `EvaluationError` where it cannot be written."""
    text = card_markdown(card) if Path(path).suffix == ".md" else card_page(card)
    return written(text, path, "the card", EvaluationError)


def card_page(card: Mapping[str, Any]) -> str:
    """The page as text."""
    return filled(
        "card.html.j2", title=_title(card), lead=LEAD, tiles=tiles(card),
        head=HEAD, families=families(card), clean_head=CLEAN_HEAD, clean=clean_rows(card), plots=_plots(card),
        blocked_head=BLOCKED_HEAD, blocked=blocked_rows(card), curve_title=curve_view.TITLE,
        curve_head=curve_view.HEAD, curves=curve_view.curve_rows(card), lessons=curve_view.lessons(card),
        meanings=MEANINGS, left_out=left_out(card), cannot=CANNOT, tested=tested(card), intervals=INTERVALS,
    )  # fmt: skip


def card_markdown(card: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    lines = [f"# {_title(card)}", "", LEAD, "", *markdown_table(CLEAN_HEAD, clean_rows(card)), ""]
    lines += [*markdown_table(BLOCKED_HEAD, blocked_rows(card)), ""]
    for family in families(card):
        lines += [f"## {family.name}: {family.says} ({family.subject})", ""]
        lines += [*markdown_table(HEAD, [row.cells for row in family.rows]), ""]
        lines += [f"- {row.attack}: {row.note}" for row in family.rows if row.note] + [""]
    if curves := curve_view.curve_rows(card):
        lines += [f"## {curve_view.TITLE}", "", *markdown_table(curve_view.HEAD, curves), ""]
        lines += [*(f"- {sentence}" for sentence in curve_view.lessons(card)), ""]
    lines += ["## What the columns mean", "", *(f"- **{name}**: {meaning}" for name, meaning in MEANINGS)]
    lines += [f"- {INTERVALS}", "", "## What cannot be held", "", *(f"- {sentence}" for sentence in CANNOT), ""]
    if missing := left_out(card):
        lines += ["## Not made", "", *(f"- {names}: {why}" for names, why in missing), ""]
    return "\n".join([*lines, "## What was tested", "", *(f"- {label}: {text}" for label, text in tested(card)), ""])


def print_card(card: Mapping[str, Any], console: Console) -> None:
    """Print the main columns."""
    _print_rows(BLOCKED_HEAD, [(cells, "") for cells in blocked_rows(card)], console)
    for family in families(card):
        console.print(Text(f"\n{family.name}: {family.says} ({family.subject})", style="bold"))
        rows = [(row.cells[:8], "yellow" if row.strong else "") for row in family.rows]
        _print_rows(HEAD[:8], rows, console)
    if curves := curve_view.curve_rows(card):
        console.print(Text(f"\n{curve_view.TITLE}", style="bold"))
        _print_rows(curve_view.HEAD[:9], [(cells[:9], "") for cells in curves], console)
    for names, why in left_out(card):
        console.print(Text(f"Not made: {names}: {why}"))
    console.print(Text("\nWhat cannot be held", style="bold"))
    for sentence in CANNOT:
        console.print(Text(f"- {sentence}"))


def _print_rows(head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], console: Console) -> None:
    """A table of rows, each with its style."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for cells, style in rows:
        table.add_row(*map(Text, cells), style=style)
    console.print(table)


def _title(card: Mapping[str, Any]) -> str:
    return f"What {', '.join(visible(subject['name']) for subject in card['subjects'][1:])} withstands"


def _plots(card: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Captions and pictures of the first subject. They are SVG of our own making, escaped by matplotlib."""
    subject = card["subjects"][1]["name"]
    rows = [row for row in card["rows"] if row["subject"] == subject and row["success"]]
    made = []
    if rows:
        caption = f"Success of every attack on {visible(subject)} (n in brackets); mark: a blind choice of an option"
        made.append((caption, card_plots.successes(rows)))
    some = [row for row in rows if row["family"] == "dilution"]
    if len({round(row["cost"]["tokens"]) for row in some}) > 1:
        made.append(("Dilution: success against the tokens of filler", card_plots.dilution(some)))
    if curves := curve_view.plot(card):
        made.append(("Relearning: right answers on the topic against epochs, of every subject", curves))
    return [(caption, Markup(scoped(svg, f"p{i}"))) for i, (caption, svg) in enumerate(made)]
