"""One progress bar for all long work: what is done, the rate, the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[[int], None]


class _Rate(ProgressColumn):
    """Units a second, over the whole task."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        shown = "" if not speed else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
        return Text(f"{shown} {task.fields['unit']}/s" if shown else "", style="dim")


@contextmanager
def progress(label: str, total: int, *, unit: str, show: bool = True, done: int = 0) -> Iterator[Advance]:
    """A bar on standard error; yields a function that is told how many units were done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not show) as bar:
        task = bar.add_task(label, total=total, completed=done, unit=unit)
        yield lambda units: bar.advance(task, units)
