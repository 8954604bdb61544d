"""The plots of a robustness card, in the manner of plots.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saeguard.report.card_view import strong
from saeguard.report.plots import GRID, MUTED, RETAIN, STYLE, TOPIC, WIDTH, as_svg, percent_tick


def successes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Success of every attack with its interval, and what a blind choice of an option would give as a mark."""
    shown = [row for row in rows if row["success"]]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.22 * len(shown)), layout="constrained")
        axes: Axes = figure.subplots()
        for place, row in enumerate(shown):
            found, colour = row["success"], TOPIC if strong(row) else RETAIN
            axes.plot([found["low"], found["high"]], [place, place], color=colour, linewidth=4, alpha=0.3)
            axes.plot([row["chance"]], [place], "|", color=MUTED, markersize=8)
            axes.plot([found["value"]], [place], "o", color=colour, markersize=5, clip_on=False, zorder=4)
        for place in range(1, len(shown)):
            if shown[place]["family"] != shown[place - 1]["family"]:
                axes.axhline(place - 0.5, color=GRID, linewidth=0.8)
        axes.set(xlim=(-0.01, 1.01), ylim=(len(shown) - 0.4, -0.6), xlabel="success")
        axes.set_yticks(range(len(shown)), [f"{row['attack']} ({row['n']})" for row in shown])
        axes.xaxis.set_major_formatter(percent_tick)
        axes.grid(True, axis="x")
        axes.spines["left"].set_visible(False)
        return as_svg(figure, "Success of every attack with its interval, a blind choice of an option as a mark")


def dilution(rows: Sequence[Mapping[str, Any]]) -> str:
    """Success against the tokens of filler, a line for each place and kind."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["success"]:
            lines.setdefault(row["attack"].removeprefix("dilution-").rpartition("-")[0], []).append(row)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes: Axes = figure.subplots()
        for (name, its), style, mark in zip(lines.items(), _STYLES, "os^Dv", strict=False):
            points = sorted((row["cost"]["tokens"], row["success"]["value"]) for row in its)
            axes.plot(*zip(*points, strict=True), marker=mark, color=TOPIC if "before" in name else RETAIN,
                      linestyle=style, markersize=5, label=name, clip_on=False)  # fmt: skip
        axes.set(xscale="symlog", ylim=(0, 1), xlabel="tokens added", ylabel="success")
        axes.yaxis.set_major_formatter(percent_tick)
        axes.grid(True)
        axes.legend(loc="upper left")
        return as_svg(figure, "Success of dilution against the tokens of filler")


_STYLES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1.5)), "-", (0, (6, 2)))
