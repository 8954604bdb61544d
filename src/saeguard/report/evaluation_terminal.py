"""The report of an evaluation for a terminal: the figures over all domains of each role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saeguard.report.comparison_view import comparison_tables
from saeguard.report.evaluation_limits import limits
from saeguard.report.evaluation_view import sections, subject_names


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print the tables and what the guardrail does not do."""
    names = subject_names(result)
    compared = comparison_tables(result)
    for shown in compared:
        console.print(Text(f"\n{shown['title']}. {shown['note']}", style="bold"))
        table = Table(box=None, padding=(0, 1), header_style="dim")
        for place, head in enumerate(shown["head"]):
            table.add_column(head, no_wrap=place == 0, overflow="fold")  # names whole, however narrow the terminal
        for cells in shown.get("short", shown["rows"]):
            table.add_row(*map(Text, cells))
        console.print(table)
    for section in () if compared else sections(result):
        console.print(Text(f"\n{section.title}. {section.note}", style="bold"))
        table = Table(box=None, padding=(0, 1), header_style="dim")
        for column in ("task", "measure"):
            table.add_column(column)
        for column in ("n", *names):
            table.add_column(column, justify="right", overflow="fold")
        for name in names[1:]:
            table.add_column("difference" if len(names) == 2 else f"{name} − {names[0]}")
        for row in section.rows:
            cells = [f"{v} ({i})" if i else v for v, i in zip(row.values, row.intervals, strict=True)]
            style = "yellow" if row.harmful else ""
            table.add_row(*map(Text, (row.task, row.measure, str(row.n), *cells, *row.changes)), style=style)
        console.print(table)
    console.print(Text("\nWhat this does not do", style="bold"))
    for sentence in limits(result):
        console.print(Text(f"- {sentence}"))
