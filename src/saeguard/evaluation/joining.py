"""Results made apart as one: the same items and the same reference, other subjects.

Figures are estimated for each subject alone and against the reference, so those of the whole are those of its parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from saeguard.errors import EvaluationError

Result = Mapping[str, Any]
SHARED = ("code", "settings", "tasks", "fit_text", "duplicates", "shared")
"""Parts of a result that all have to have alike."""
FIGURE = ("task", "measure", "role", "domain")
"""What names a figure."""


def joined(results: Sequence[Result]) -> dict[str, Any]:
    """The subjects of all. Raises `EvaluationError` where results are not of the same items, code and reference."""
    first, *others = results
    if not others:
        return dict(first)
    for one in others:
        _check(first, one)
    reference = first["subjects"][0]
    whole = dict(first)
    whole["subjects"] = [reference, *(subject for one in results for subject in one["subjects"][1:])]
    _check_names(subject["name"] for subject in whole["subjects"])
    whole["guardrails"] = {name: its for one in results for name, its in one["guardrails"].items()}
    whole["figures"] = _figures(results)
    whole["gates"] = [gate for one in results for gate in one["gates"]]
    whole["examples"] = [example for one in results for example in one["examples"]]
    records = [
        record for one in results for record in one["records"] if one is first or record["subject"] != reference["name"]
    ]
    order = {task["name"]: place for place, task in enumerate(first["tasks"])}
    whole["records"] = sorted(records, key=lambda record: order[record["task"]])
    if "comparison" in first:
        methods = {name: its for one in results for name, its in one["comparison"]["methods"].items()}
        unfitted = {name: its for one in results for name, its in one["comparison"].get("unfitted", {}).items()}
        whole["comparison"] = {**first["comparison"], "methods": methods, "unfitted": unfitted}
    return whole


def _check(first: Result, other: Result) -> None:
    differing = [part for part in SHARED if first[part] != other[part]]
    if _reference(first) != _reference(other):
        differing.append("the reference and its records")
    if _protocol(first) != _protocol(other):
        differing.append("how methods were tuned or trained further")
    if differing:
        raise EvaluationError(
            f"results that are to be drawn as one differ in {', '.join(differing)}: expected the same items, judged by "
            "the same code beside the same reference. Run them again, or draw each alone."
        )


def _reference(result: Result) -> Any:
    reference = result["subjects"][0]
    scores = {
        (record["task"], record["item"]): record["scores"]
        for record in result["records"]
        if record["subject"] == reference["name"]
    }
    return reference, scores


def _protocol(result: Result) -> Any:
    """A comparison's own settings."""
    return {name: its for name, its in result.get("comparison", {}).items() if name not in ("methods", "unfitted")}


def _check_names(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise EvaluationError(f"two of the results have a subject {name}: give one of them, or another name")
        seen.add(name)


def _figures(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each figure once, in the order of the first result that has it, with what all say of it."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        for row in result["figures"]:
            kept = rows.setdefault(tuple(row[key] for key in FIGURE), {**row, "estimates": {}, "differences": {}})
            kept["estimates"] |= row["estimates"]
            kept["differences"] |= row["differences"]
    return list(rows.values())
