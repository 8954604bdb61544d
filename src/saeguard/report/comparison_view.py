"""A comparison as rows to read: what each method forgets, keeps and breaks, what it costs, and what was tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeguard.report import evaluation_plots as plots
from saeguard.report.evaluation_view import find, interval, value
from saeguard.report.formatting import number, percent, visible

FIGURES = (
    ("topic: right", "mcq", "accuracy", "topic"),
    ("topic: refused", "mcq", "refused", "topic"),
    ("near: right", "near", "accuracy", "near"),
    ("near: refused", "near", "refused", "near"),
    ("far: right", "mcq", "accuracy", "far"),
    ("far: refused", "mcq", "refused", "far"),
    ("topic, open: match", "open", "match", "topic"),
    ("topic, open: gibberish", "open", "gibberish", "topic"),
    ("topic, open: refusals", "open", "refusal", "topic"),
    ("near, open: gibberish", "open", "gibberish", "near"),
    ("far, open: gibberish", "open", "gibberish", "far"),
    ("topic: right", "tofu", "accuracy", "topic"),
    ("topic: refused", "tofu", "refused", "topic"),
    ("topic: ROUGE", "tofu", "rouge", "topic"),
    ("topic: probability", "tofu", "probability", "topic"),
    ("topic: gibberish", "tofu", "gibberish", "topic"),
    ("forget quality", "tofu", "forget quality", "topic"),
    ("near: right", "tofu", "accuracy", "near"),
    ("near: refused", "tofu", "refused", "near"),
    ("near: ROUGE", "tofu", "rouge", "near"),
    ("near: gibberish", "tofu", "gibberish", "near"),
    ("far: right", "tofu", "accuracy", "far"),
    ("far: refused", "tofu", "refused", "far"),
    ("far: ROUGE", "tofu", "rouge", "far"),
    ("model utility", "tofu", "model utility", "far"),
)
COSTS = ("method", "configurations tried", "chosen", "MB to ship")
MEASURED = ("fit: seconds", "fit: peak MB", "ms a token", "overhead")
NOTE = (
    "Every method tried the same number of configurations, or all of its grid where that is smaller, and was chosen by "
    "one rule on dev items; figures are of test items. A refused question counts as not right, on the topic as "
    "elsewhere, so a refusing method can fall below chance: judge it by what it keeps and what it refuses."
)
COST_NOTE = (
    "Fitting: the chosen configuration alone, from nothing, in a process of its own. A token: median over single "
    "prompts of the time to write 16 tokens, prompt included; the overhead is over the unguarded model, in pairs."
)


def comparison_tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables, each with title, note, head and rows, the first with `short` rows that have no intervals too.

    None where the result is of no comparison.
    """
    if "comparison" not in result:
        return []
    names, methods = [subject["name"] for subject in result["subjects"]], result["comparison"]["methods"]
    figures = [(label, figure) for label, *key in FIGURES if (figure := find(result, *key)) is not None]
    note, relearning = NOTE, result["comparison"].get("relearning")
    if relearning is not None:
        label = f"topic after {_epochs(relearning)} of relearning: right"
        figures.insert(1, (label, _relearned({names[0]: relearning["control"]}, methods)))  # beside what it was
        note = f"{NOTE} {_lesson(relearning)}"
    unfitted = result["comparison"].get("unfitted", {})
    if unfitted:
        note = f"{note} Not here, as none of its configurations could be fitted: {visible(', '.join(unfitted))}."
    short, quality = (
        [[visible(name), *(shown(figure, name) for _, figure in figures)] for name in names]
        for shown in (_value, _with_interval)
    )
    return [
        {"title": "The methods", "note": note, "head": ["method", *(label for label, _ in figures)], "rows": quality,
         "short": short},
        _costs(methods),
        {"title": "What was tried", "note": "Accuracy on dev items; off the topic is near and far together.",
         "head": ["method", "configuration", "on the topic", "off the topic", ""],
         "rows": [row for name, method in methods.items() for row in _tried(name, method)]
         + [row for name, its in unfitted.items() for row in _tried(name, {"points": [], "failed": its})]},
    ]  # fmt: skip


def frontiers(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The methods on test items, by what they forget and keep; nothing where the result is of no comparison."""
    if "comparison" not in result:
        return []
    topic, made = _accuracy(result, "topic"), []
    for label, role in (("accuracy on neighbours", "near"), ("accuracy on far topics", "far")):
        figure = _accuracy(result, role)
        if figure is not None and topic is not None:
            points = [
                plots.Point(visible(name), plots.ranged(figure["estimates"][name]), plots.ranged(its))
                for name, its in topic["estimates"].items()
            ]
            caption = f"Forgetting against {label}, test items: down and to the right is better"
            made.append((caption, plots.frontier(points, label=label, named=True)))
    return made


def tried_plots(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """For each method all that it tried on dev items."""
    made = []
    for name, method in result["comparison"]["methods"].items():
        points = [
            plots.Point(
                _setting(p["setting"], method),
                plots.ranged(p["kept"]),
                plots.ranged(p["accuracy"]["topic"]),
                i == method["chosen"],
            )
            for i, p in enumerate(method["points"])
        ]
        made.append(
            (f"{visible(name)}: all configurations on dev items, the chosen one marked", plots.frontier(points))
        )
    return made


def _accuracy(result: Mapping[str, Any], role: str) -> Mapping[str, Any] | None:
    found = (find(result, *key) for _, *key in FIGURES if (key[1], key[2]) == ("accuracy", role))
    return next((figure for figure in found if figure is not None), None)


def _relearned(control: Mapping[str, Any], methods: Mapping[str, Any]) -> dict[str, Any]:
    """Right answers on the topic after relearning, as a figure; `control` is the model without any method."""
    after = {**control, **{name: method["relearned"] for name, method in methods.items()}}
    return {"kind": "rate", "estimates": {name: its["accuracy"] for name, its in after.items() if "accuracy" in its}}


def _lesson(relearning: Mapping[str, Any]) -> str:
    return (
        f"Relearning: all weights trained for {_epochs(relearning)} on {relearning['lesson']['documents']} documents "
        "of the forget text, in which no asked question stands; of a method that changes no weights those of the plain "
        "model, and the method put on it again. A method whose training diverged has no figure."
    )


def _epochs(relearning: Mapping[str, Any]) -> str:
    count = relearning["epochs"]
    return f"{count} epoch{'s' if count > 1 else ''}"


def _value(figure: Mapping[str, Any], name: str) -> str:
    estimate = figure["estimates"].get(name)
    return "-" if estimate is None else value(figure["kind"], estimate["value"])


def _with_interval(figure: Mapping[str, Any], name: str) -> str:
    estimate = figure["estimates"].get(name)
    between = "" if estimate is None else interval(figure["kind"], estimate)
    return _value(figure, name) + (f" ({between})" if between else "")


def _costs(methods: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen and has to be shipped; with what fitting and running takes, where that was measured."""
    measured = all("fit" in method for method in methods.values())
    rows = []
    for name, method in methods.items():
        chosen = method["points"][method["chosen"]]["setting"]
        row = [visible(name), str(method["configurations"]), _setting(chosen, method), number(method["bytes"] / 1e6)]
        rows.append(row + (_times(method["fit"], method["run"]) if measured else []))
    head = [*COSTS, *(MEASURED if measured else ())]
    return {"title": "What they cost", "note": COST_NOTE if measured else "", "head": head, "rows": rows}


def _times(fit: Mapping[str, float], run: Mapping[str, float]) -> list[str]:
    return [
        f"{fit['seconds']:.0f}", f"{fit['peak_memory_mb']:.0f}", number(run["ms_per_token"]),
        f"{100 * run['overhead']:+.1f} %",
    ]  # fmt: skip


def _tried(name: str, method: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        [visible(name), _setting(point["setting"], method), percent(point["accuracy"]["topic"]["value"]),
         percent(point["kept"]["value"]), "chosen" if i == method["chosen"] else ""]
        for i, point in enumerate(method["points"])
    ]  # fmt: skip
    return rows + [
        [visible(name), _setting(one["setting"], method), "-", "-", visible(one["why"])] for one in method["failed"]
    ]


def _setting(setting: Mapping[str, Any], method: Mapping[str, Any]) -> str:
    """What varies of a setting among those that were tried; all of it where nothing does."""
    tried = [*(point["setting"] for point in method["points"]), *(one["setting"] for one in method["failed"])]
    varying = [axis for axis in setting if any(other[axis] != setting[axis] for other in tried)] or list(setting)
    return visible(", ".join(f"{axis} {setting[axis]}" for axis in varying))
