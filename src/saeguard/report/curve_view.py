"""Relearning curves of a robustness card as rows to read, and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from saeguard.report.formatting import number, percent, visible
from saeguard.report.plots import MUTED, RETAIN, STYLE, TOPIC, WIDTH, as_svg, percent_tick

HEAD = ("attack", "subject", "epochs", "refit", "topic: right", "topic: triggered", "near: right", "far: right",
        "topic: right without the hook", "steps", "tokens")  # fmt: skip
TITLE = "Relearning: all questions after more and more epochs"
_STYLES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1.5)))
Row = Mapping[str, Any]


def curve_rows(card: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Every point of every curve, as cells under `HEAD`; epochs 0 is before training."""
    return [tuple(map(visible, _cells(point))) for point in card.get("curves", ())]


def lessons(card: Mapping[str, Any]) -> list[str]:
    """What each attack trained on, as it was found to be."""
    found, settings = [], card["settings"]
    for name, its in card.get("lessons", {}).items():
        rate = settings["lora_learning_rate" if "-lora" in name else "learning_rate"]
        of = ", ".join(f"{corpus} ({one['documents']})" for corpus, one in its["corpora"].items())
        found.append(
            f"{name} trains on {its['documents']} documents of {its['text']} text, of the fit split of {of}; none of "
            f"the {its['questions_compared']} questions stands in them. A step is of {settings['batch']} windows of at "
            f"most {settings['max_tokens']} tokens, the learning rate {rate:g}."
        )
    return [visible(sentence) for sentence in found]


def plot(card: Mapping[str, Any]) -> str | None:
    """Right answers on the topic against epochs, a line for each subject, attack and refit; None without curves."""
    lines: dict[str, list[Row]] = {}
    for point in card.get("curves", ()):
        parts = (point["subject"], point["attack"], *([f"refit {point['refit']}"] if point["refit"] else []))
        lines.setdefault(", ".join(map(visible, parts)), []).append(point)
    if not lines:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
        axes: Axes = figure.subplots()
        for place, (name, its) in enumerate(lines.items()):
            shown = [(one["epochs"], _judged(one)["topic"]["right"]) for one in its if "topic" in _judged(one)]
            epochs, rates = [epoch for epoch, _ in shown], [rate for _, rate in shown]
            colour = (TOPIC, RETAIN, MUTED)[place % 3]
            axes.plot(epochs, [rate["rate"] for rate in rates], marker="os^Dv"[place % 5], color=colour, label=name,
                      linestyle=_STYLES[place // 3 % 3], markersize=5, clip_on=False)  # fmt: skip
            axes.vlines(epochs, *zip(*(rate["interval"] for rate in rates), strict=True), color=colour, alpha=0.3)
        axes.set_xscale("symlog", linthresh=1)
        ticks = sorted({point["epochs"] for its in lines.values() for point in its})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(ylim=(0, 1), xlabel="epochs", ylabel="right on the topic")
        axes.yaxis.set_major_formatter(percent_tick)
        axes.grid(True)
        axes.legend(loc="best")
        return as_svg(figure, "Right answers on the topic against epochs of relearning, with intervals")


def _judged(point: Row) -> Row:
    """Rates under the guardrail, or of a model that has none."""
    found: Row = point["guarded"] or point["model"]
    return found


def _cells(point: Row) -> tuple[str, ...]:
    its, cost = _judged(point), point.get("cost", {"steps": 0, "tokens": 0})
    topic, alone = its.get("topic"), point["model"].get("topic") if point["guarded"] else None
    return (
        point["attack"], point["subject"], str(point["epochs"]), point["refit"] or "-", _right(topic),
        percent(topic["triggered"]["rate"]) if topic and topic["triggered"] else "-",
        _right(its.get("near")), _right(its.get("far")), _right(alone), number(cost["steps"]), number(cost["tokens"]),
    )  # fmt: skip


def _right(its: Row | None) -> str:
    if its is None:
        return "-"
    rate = its["right"]
    low, high = rate["interval"]
    return f"{percent(rate['rate'])} ({100 * low:.0f} to {100 * high:.0f} %)"
