"""A sweep as rows to read: every setting that was tried, on dev items, and the one that was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saeguard.report import evaluation_plots as plots
from saeguard.report.formatting import percent, visible

ROLES = ("topic", "near", "far")


def sweep_table(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Head and rows; None where the result is of no sweep."""
    sweep = result.get("sweep")
    if sweep is None:
        return None
    axes = list(sweep["axes"])
    roles = [role for role in ROLES if all(role in point["accuracy"] for point in sweep["points"])]
    rows = [
        {"chosen": i == sweep["chosen"], "cells": [
            *(_shown(point["setting"][axis]) for axis in axes),
            *(_share(point["accuracy"][role]) for role in roles),
            *(percent(point["triggered"][role]["value"]) for role in roles),
        ]}
        for i, point in enumerate(sweep["points"])
    ]  # fmt: skip
    head = [*axes, *(f"accuracy, {role}" for role in roles), *(f"triggered, {role}" for role in roles)]
    return {"head": head, "rows": rows, "note": f"{sweep['rule']} {sweep['note']}"}


def sweep_plots(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The frontier over all settings, and a curve along each swept setting from the chosen point."""
    sweep = result.get("sweep")
    if sweep is None:
        return []
    points = [
        plots.Point(
            _name(point["setting"], sweep["axes"]),
            plots.ranged(point["kept"]),
            plots.ranged(point["accuracy"]["topic"]),
            i == sweep["chosen"],
        )
        for i, point in enumerate(sweep["points"])
    ]
    made = [("Forgetting against utility on dev items, the chosen setting marked", plots.frontier(points))]
    chosen = sweep["points"][sweep["chosen"]]["setting"]
    for axis, values in sweep["axes"].items():
        along = [p for v in values for p in sweep["points"] if p["setting"] == {**chosen, axis: v}]
        if len(along) > 1:
            lines = {role: [p["accuracy"][role] for p in along] for role in ROLES if role in along[0]["accuracy"]}
            made.append((f"Along {visible(axis)}, the other settings as chosen", _curve(axis, along, lines)))
    return made


def _curve(axis: str, along: Sequence[Mapping[str, Any]], lines: Mapping[str, Any]) -> str:
    return plots.curves(visible(axis), [point["setting"][axis] for point in along], lines)


def _name(setting: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> str:
    """The settings that vary."""
    return ", ".join(f"{axis} {_shown(value)}" for axis, value in setting.items() if len(axes[axis]) > 1)


def _shown(value: Any) -> str:
    return visible(str(value))


def _share(estimate: Mapping[str, float]) -> str:
    return f"{percent(estimate['value'])} ({100 * estimate['low']:.0f} to {100 * estimate['high']:.0f})"
