"""The plots of an evaluation, in the manner of plots.py: SVG text, one look on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saeguard.report.formatting import number
from saeguard.report.plots import GRID, INK, MARK, MUTED, NEAR, RETAIN, STYLE, TOPIC, WIDTH, as_svg, percent_tick, short

COLOURS = {"topic": TOPIC, "near": NEAR, "far": RETAIN}


@dataclass(frozen=True)
class Point:
    """A point of the frontier: utility kept and topic still known, each (value, low, high)."""

    name: str
    utility: tuple[float, float, float]
    topic: tuple[float, float, float]
    chosen: bool = False


def ranged(estimate: Mapping[str, float]) -> tuple[float, float, float]:
    """An estimate as a point has it: value, low, high."""
    return estimate["value"], estimate["low"], estimate["high"]


def before_after(figures: Sequence[Mapping[str, Any]], before: str, after: str, label: str) -> str:
    """A share per domain without and with the guardrail, with intervals; the domain's role as colour."""
    rows = [f for f in figures if before in f["estimates"] and after in f["estimates"]]
    with rc_context(STYLE):
        figure, axes = _figure(0.9 + 0.3 * len(rows))
        for place, row in enumerate(rows):
            old, new, colour = row["estimates"][before], row["estimates"][after], COLOURS[row["role"]]
            axes.plot([new["low"], new["high"]], [place, place], color=colour, linewidth=4, alpha=0.25, zorder=1)
            axes.plot([old["value"], new["value"]], [place, place], color=MUTED, linewidth=1.6, zorder=2)
            axes.plot([old["value"]], [place], "o", color=MUTED, markersize=8, zorder=3)
            axes.plot([new["value"]], [place], "o", color=colour, markersize=5, zorder=4)
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), xlabel=label)
        axes.set_yticks(range(len(rows)), [short(row["domain"]) for row in rows])
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(COLOURS[row["role"]])
        axes.xaxis.set_major_formatter(percent_tick)
        axes.grid(True, axis="x")
        axes.spines["left"].set_visible(False)
        return as_svg(figure, f"{label}, unguarded in grey and guarded in colour, per domain")


def frontier(points: Sequence[Point], *, label: str = "accuracy off the topic", named: bool = False) -> str:
    """What is still known of the topic against what is kept of the rest; down and to the right is better.

    Few points have their names and intervals, many neither; with `named` all have both, the names beside the plot.
    """
    with rc_context(STYLE):
        many = len(points) > 8
        figure, axes = _figure(5.0 if named else 4.2)
        for point in points:
            colour = MARK if point.chosen else MUTED if many and not named else INK
            x, y = point.utility[0], point.topic[0]
            if point.chosen or named or not many:
                axes.plot(point.utility[1:], [y, y], color=colour, linewidth=1.2, alpha=0.15 if many else 0.6)
                axes.plot([x, x], point.topic[1:], color=colour, linewidth=1.2, alpha=0.15 if many else 0.6)
            if point.chosen or not (many or named):
                place: Any = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": 8}
                axes.annotate(short(point.name), (x, y), color=colour, **place)
            axes.plot([x], [y], "o", color=colour, markersize=7 if point.chosen or not many else 4)
        _steps(axes, points)
        axes.set(xlabel=label, ylabel="accuracy on the topic")
        axes.xaxis.set_major_formatter(percent_tick)
        axes.yaxis.set_major_formatter(percent_tick)
        axes.margins(0.12)
        axes.grid(True)
        if named:
            _names_beside(axes, points)
        return as_svg(figure, "Forgetting against utility: accuracy on the topic and off it")


def _names_beside(axes: Axes, points: Sequence[Point]) -> None:
    """The names in a column to the right, in the order of the points' heights, each with a line to its point."""
    low, high = axes.get_ylim()
    gap, height = (high - low) / 22, low
    for point in sorted(points, key=lambda point: (point.topic[0], -point.utility[0])):
        height = max(point.topic[0], height + gap)
        axes.annotate(
            short(point.name), (point.utility[0], point.topic[0]), (1.03, height), fontsize=8, color=INK, va="center",
            textcoords=axes.get_yaxis_transform(), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "alpha": 0.6},
        )  # fmt: skip


def _steps(axes: Axes, points: Sequence[Point]) -> None:
    """The frontier itself: the points that no other beats on both sides."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.utility[0], p.topic[0])):
        if not best or point.topic[0] < best[-1].topic[0]:
            best.append(point)
    xs, ys = [p.utility[0] for p in best], [p.topic[0] for p in best]
    axes.plot(xs, ys, color=TOPIC, linewidth=1.4, drawstyle="steps-post")


def roc(gate: Mapping[str, Any]) -> str:
    """Topic items that trigger against others that do, as the threshold falls."""
    with rc_context(STYLE):
        figure, axes = _figure(3.8)
        axes.plot([0, 1], [0, 1], color=GRID, linewidth=1)
        for role, curve in gate["curves"].items():
            area = curve["auroc"]
            label = f"against {role}: AUROC {area['value']:.3f} ({area['low']:.3f} to {area['high']:.3f})"
            axes.plot(*zip(*curve["points"], strict=True), color=COLOURS[role], linewidth=2, label=label)
        axes.set(xlim=(-0.01, 1), ylim=(0, 1.01), xlabel="others that trigger", ylabel="topic items that trigger")
        axes.xaxis.set_major_formatter(percent_tick)
        axes.yaxis.set_major_formatter(percent_tick)
        axes.legend(loc="lower right")
        axes.grid(True)
        return as_svg(figure, f"ROC of the gate on the task {gate['task']}")


def statistics(gate: Mapping[str, Any]) -> str:
    """The gate statistic of every judged item: a row of bars per domain, with the threshold."""
    rows, edges, threshold = gate["histograms"], np.asarray(gate["edges"]), gate["threshold"]
    with rc_context(STYLE):
        figure, axes = _figure(0.7 + 0.34 * len(rows))
        end = max(edges[-1], threshold) * 1.02
        axes.axvspan(threshold, end, color=MARK, alpha=0.08, linewidth=0)
        for place, row in enumerate(rows):
            base = len(rows) - 1 - place
            share = np.sqrt(np.asarray(row["counts"]) / max(1, max(row["counts"])))
            axes.bar(edges[:-1], 0.82 * share, np.diff(edges) * 0.92, bottom=base, align="edge",
                     color=COLOURS[row["role"]], linewidth=0)  # fmt: skip
            axes.axhline(base, color=GRID, linewidth=0.6, zorder=0)
            axes.text(end * 1.015, base + 0.25, f"{row['above']} of {row['n']}", va="center", fontsize=8, color=MUTED)
        axes.axvline(threshold, color=MARK, linewidth=1.4)
        axes.text(threshold, len(rows) + 0.02, f" threshold {number(threshold)}", color=MARK, va="bottom", ha="center")
        axes.set(xlim=(edges[0], end), ylim=(-0.08, len(rows)), xlabel="gate statistic")
        axes.set_yticks([len(rows) - 0.75 - i for i in range(len(rows))], [short(row["domain"]) for row in rows])
        axes.spines["left"].set_visible(False)
        return as_svg(figure, f"Histograms of the gate statistic per domain, task {gate['task']}")


def curves(axis: str, values: Sequence[float], lines: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Estimates along one swept setting, with their intervals; on a categorical axis by place."""
    with rc_context(STYLE):
        figure, axes = _figure(3.2)
        for (name, estimates), colour in zip(lines.items(), (TOPIC, NEAR, RETAIN), strict=False):
            axes.plot(values, [one["value"] for one in estimates], "o-", color=colour, markersize=4, label=name)
            lows, highs = [one["low"] for one in estimates], [one["high"] for one in estimates]
            axes.fill_between(values, lows, highs, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel=axis, ylim=(0, 1), ylabel="accuracy")
        axes.set_xticks(values)
        axes.yaxis.set_major_formatter(percent_tick)
        axes.legend()
        axes.grid(True)
        return as_svg(figure, f"Accuracy along {axis}, with 95 % intervals")


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()
