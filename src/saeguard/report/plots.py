"""The plots of the page as SVG text to put into HTML.

Colours are CSS variables with a fallback, so one plot reads on a light and on a dark page; text stays text. No
global state of matplotlib is changed, no file or address is referred to, and the same figures give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from saeguard.report.formatting import number, percent, visible
from saeguard.report.view import FeatureRow, GateRow, Share
from saeguard.sample import FORGET

INK, MUTED, GRID, TOPIC, RETAIN, MARK = "#20262c", "#66707a", "#c9cfd5", "#c4511f", "#2c7a8c", "#8a3ffc"
NEAR = "#8a6d1f"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", TOPIC: "topic", RETAIN: "retain", MARK: "mark", NEAR: "near"}
WIDTH = 6.4
NAME_LENGTH = 22
STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9,
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": INK, "axes.edgecolor": GRID,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "grid.color": GRID,
    "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False, "legend.labelcolor": INK,
    "xtick.major.size": 0, "ytick.major.size": 0,
}  # fmt: skip


def histograms(summary: Mapping[str, Any]) -> str:
    """The gate statistic of every held-out window: a row of bars per corpus, with the threshold."""
    edges, counts = np.asarray(summary["histograms"]["edges"]), summary["histograms"]["counts"]
    names = sorted(counts, key=lambda name: (name != FORGET, name))
    threshold = summary["threshold"]
    hits = summary["false_positives"] | {FORGET: summary["caught"]}
    with rc_context(STYLE):
        figure, axes = _figure(max(1.2, 0.55 + 0.34 * len(names)))
        end = max(edges[-1], threshold) * 1.02
        axes.axvspan(threshold, end, color=MARK, alpha=0.08, linewidth=0)
        for row, name in enumerate(names):
            share = np.sqrt(np.asarray(counts[name]) / max(1, max(counts[name])))
            axes.bar(
                edges[:-1], 0.82 * share, np.diff(edges) * 0.92, bottom=len(names) - 1 - row, align="edge",
                color=TOPIC if name == FORGET else RETAIN, linewidth=0,
            )  # fmt: skip
            axes.axhline(len(names) - 1 - row, color=GRID, linewidth=0.6, zorder=0)
            text = f"{hits[name]['hits']} of {hits[name]['n']}"
            axes.text(end * 1.015, len(names) - 0.75 - row, text, va="center", fontsize=8, color=MUTED)
        axes.axvline(threshold, color=MARK, linewidth=1.4)
        axes.text(threshold, len(names) + 0.02, f" threshold {number(threshold)}", color=MARK, va="bottom", ha="center")
        axes.set(xlim=(min(0.0, edges[0]), end), ylim=(-0.08, len(names)), xlabel="gate statistic")
        axes.set_yticks([len(names) - 0.75 - row for row in range(len(names))], [short(name) for name in names])
        axes.spines["left"].set_visible(False)
        return as_svg(figure, "Histograms of the gate statistic per corpus, with the threshold")


def trade_off(gates: Mapping[str, Mapping[str, Any]], chosen: str) -> str:
    """Caught against the mean and the worst false-positive rate as the threshold moves, and the point in use."""
    with rc_context(STYLE):
        figure, axes = _figure(4.3)
        for kind, summary in gates.items():
            if kind != chosen:
                axes.plot(
                    *_curve(summary, "mean_false"),
                    color=MUTED,
                    linewidth=1.2,
                    label=f"{kind}, mean",
                    dashes=_DASHES[kind],
                )
        summary = gates[chosen]
        false = [rate["rate"] for rate in summary["false_positives"].values()]
        caught = summary["caught"]["rate"]
        for key, colour, at in (("worst_false", TOPIC, max(false)), ("mean_false", RETAIN, sum(false) / len(false))):
            label = f"{chosen}, {'mean' if key == 'mean_false' else 'worst corpus'}"
            axes.plot(*_curve(summary, key), color=colour, linewidth=2, label=label)
            axes.plot([at], [caught], "o", color=colour, markersize=8, clip_on=False, zorder=5)
        axes.annotate(
            "in use",
            (sum(false) / len(false), caught),
            xytext=(10, -14),
            textcoords="offset points",
            color=INK,
            fontsize=9,
        )
        axes.set(
            xlim=(0, min(1.0, max(0.3, 1.15 * max(false)))),
            ylim=(0, 1.01),
            xlabel="false positives",
            ylabel="topic caught",
        )
        axes.xaxis.set_major_formatter(percent_tick)
        axes.yaxis.set_major_formatter(percent_tick)
        axes.grid(True)
        axes.legend(loc="lower right", handlelength=2.2)
        return as_svg(figure, "Topic caught against false positives as the threshold moves, with the point in use")


_DASHES = {"density": (1, 1.5), "evidence": (4, 2), "probe": (6, 1.5, 1, 1.5)}


def intervals(gate: GateRow, alpha: float | None) -> str:
    """The share of held-out windows that triggers, per corpus, with 95 % Wilson intervals."""
    shares = [*([gate.caught] if gate.caught.n else []), *gate.false_positives]
    with rc_context(STYLE):
        figure, axes = _figure(0.6 + 0.27 * len(shares))
        for row, share in enumerate(shares):
            colour = TOPIC if share is gate.caught else RETAIN
            axes.plot(
                [share.low, share.high], [row, row], color=colour, linewidth=4, alpha=0.35, solid_capstyle="round"
            )
            axes.plot([share.rate], [row], "o", color=colour, markersize=6, clip_on=False)
        if alpha is not None:
            axes.axvline(alpha, color=MARK, linewidth=1.2, dashes=(3, 2))
            axes.text(alpha, -0.8, f" α = {percent(alpha)}", color=MARK, va="bottom")
        _rows(axes, shares, "share of held-out windows that triggers")
        return as_svg(figure, "Share of windows that triggers, per corpus, with 95 % intervals")


def accuracy(unguarded: Sequence[Share], guarded: Sequence[Share], chance: float | None = None) -> str:
    """Right answers without and with the guardrail, per question set."""
    with rc_context(STYLE):
        figure, axes = _figure(1.2 + 0.32 * len(guarded))
        for row, (before, after) in enumerate(zip(unguarded, guarded, strict=True)):
            axes.plot([before.rate, after.rate], [row, row], color=MUTED, linewidth=2, alpha=0.6, zorder=1)
            axes.plot([before.rate], [row], "o", color=MUTED, markersize=8, label="unguarded" if row == 0 else None)
            axes.plot([after.rate], [row], "o", color=RETAIN, markersize=5, label="guarded" if row == 0 else None)
        if chance is not None:
            axes.axvline(chance, color=MARK, linewidth=1.2, dashes=(3, 2))
            axes.text(chance, -0.8, " chance", color=MARK, va="bottom")
        _rows(axes, guarded, "right answers")
        figure.legend(loc="outside lower center", ncols=2)
        return as_svg(figure, "Right answers without and with the guardrail, per question set")


def heat_map(features: Sequence[FeatureRow]) -> str:
    """Firing rate of every feature in every corpus; the stronger the colour, the more tokens."""
    names = sorted(features[0].feature.firing_rates, key=lambda name: (name != FORGET, name))
    most = max((max(row.feature.firing_rates.values()) for row in features), default=0.0) or 1.0
    with rc_context(STYLE):
        figure, axes = _figure(1.7 + 0.17 * len(features), width=max(WIDTH, 1.2 + 0.34 * len(names)))
        for row in features:
            for column, name in enumerate(names):
                opacity = (row.feature.firing_rates[name] / most) ** 0.5
                _cell(axes, column, row.rank - 1, opacity, TOPIC if name == FORGET else RETAIN)
        axes.set(xlim=(0, len(names)), ylim=(len(features), 0))
        axes.set_xticks(
            [c + 0.5 for c in range(len(names))],
            [short(n) for n in names],
            rotation=45,
            ha="left",
            rotation_mode="anchor",
        )
        axes.set_yticks([row.rank - 0.5 for row in features], [str(row.feature.id) for row in features], fontsize=7)
        axes.xaxis.tick_top()
        axes.tick_params(axis="x", colors=INK, pad=2)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(f"share of tokens: clear is 0, full colour {percent(most)} (square root scale)")
        return as_svg(figure, "Firing rate of every feature in every corpus")


def scoped(svg: str, scope: str) -> str:
    """The SVG with its ids made different from those of the same plot elsewhere on the page."""
    return re.sub(r'(?<=\bid=")|(?<=href="#)|(?<=url\(#)', f"{scope}-", svg)


def _cell(axes: Axes, column: int, row: int, opacity: float, colour: str) -> None:
    face = to_rgba(colour, opacity)
    axes.add_patch(Rectangle((column + 0.04, row + 0.06), 0.92, 0.88, facecolor=face, linewidth=0))


def _curve(summary: Mapping[str, Any], key: str) -> tuple[list[float], list[float]]:
    points = sorted(summary["curve"], key=lambda point: -point["threshold"])
    return [point[key] for point in points], [point["caught"] for point in points]


def _rows(axes: Axes, shares: Sequence[Share], label: str) -> None:
    axes.set(xlim=(0, 1), ylim=(len(shares) - 0.4, -0.9), xlabel=label)
    axes.set_yticks(range(len(shares)), [short(share.name) for share in shares])
    axes.xaxis.set_major_formatter(percent_tick)
    axes.grid(True, axis="x")
    axes.tick_params(axis="y", pad=9)
    axes.spines["left"].set_visible(False)


def percent_tick(value: float, _: object) -> str:
    return percent(value)


def short(name: str) -> str:
    name = visible(name)
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"


def _figure(height: float, *, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure in inches with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def as_svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element without ids of groups, namespaces, metadata or fixed colours."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": label}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", text[text.index("<svg") :])
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name}, {colour})")
    width = round(figure.get_figwidth() * 90)
    text = re.sub(r'^<svg width="[^"]*" height="[^"]*"', f'<svg style="max-width: {width}px"', text)
    return text.replace("<svg", f'<svg class="plot" role="img" aria-label="{escape(label)}"', 1)
