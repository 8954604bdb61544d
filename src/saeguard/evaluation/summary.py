"""From records to figures: for every measure and domain, and for all domains of a role together, an estimate for each
subject and its difference from the first one on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from saeguard.choices import Role
from saeguard.evaluation.statistics import Columns, area_under_curve, as_columns, difference, estimate, roc_points
from saeguard.evaluation.task import ROLES, Measure, Record, Task

TRIGGERED = Measure("triggered", "rate", "share of items that triggered the guardrail")
BINS = 40


def figures(task: Task, records: Mapping[str, Sequence[Record]], seed: int) -> list[dict[str, Any]]:
    """Rows of estimates and differences, by role and then by domain; what the task derives comes last."""
    rows = []
    for measure in (*task.measures, TRIGGERED):
        for role in ROLES:
            domains = sorted({r.domain for its in records.values() for r in its if r.role == role})
            groups = [None, *domains] if len(domains) > 1 else domains
            rows += [row for domain in groups if (row := _row(task.name, measure, role, domain, records, seed))]
    return rows + _derived(task, records, seed)


def _row(
    task: str, measure: Measure, role: str, domain: str | None, records: Mapping[str, Sequence[Record]], seed: int
) -> dict[str, Any] | None:
    """One figure of all subjects; None where no record carries it."""
    columns = {
        name: _columns(measure, [r for r in its if r.role == role and domain in (None, r.domain)])
        for name, its in records.items()
    }
    found = {name: by_item for name, by_item in columns.items() if by_item}
    if not found:
        return None
    reference = next(iter(records))
    values = {name: asdict(estimate(measure.kind, as_columns(list(its.values())), seed)) for name, its in found.items()}
    differences = {}
    for name, its in found.items():
        shared = [item for item in its if item in found.get(reference, {})]
        if name != reference and shared:
            after, before = (as_columns([by_item[item] for item in shared]) for by_item in (its, found[reference]))
            differences[name] = asdict(difference(measure.kind, after, before, seed))
    return {
        "task": task, "measure": measure.name, "kind": measure.kind, "sense": measure.sense, "role": role,
        "domain": domain, "estimates": values, "differences": differences,
    }  # fmt: skip


def _columns(measure: Measure, records: Sequence[Record]) -> dict[str, list[float]]:
    """The measure's scores by item, of the records that carry them."""
    if measure is TRIGGERED:
        return {r.item: [float(r.triggered)] for r in records if r.triggered is not None}
    keys = measure.keys
    return {r.item: [r.scores[key] for key in keys] for r in records if all(key in r.scores for key in keys)}


def _derived(task: Task, records: Mapping[str, Sequence[Record]], seed: int) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, its in records.items():
        for one in task.derived(its, seed):
            row = rows.setdefault((one.name, one.domain), {
                "task": task.name, "measure": one.name, "kind": "derived", "sense": one.sense, "role": one.role,
                "domain": one.domain, "meaning": one.meaning, "estimates": {}, "differences": {},
            })  # fmt: skip
            row["estimates"][name] = asdict(one.estimate)
    return list(rows.values())


def gate_figures(task: str, subject: str, threshold: float, records: Sequence[Record], seed: int) -> dict[str, Any]:
    """Gate statistics under one guardrail: histograms by domain, and how well they tell the topic from the rest."""
    values: dict[tuple[Role, str], list[float]] = {}
    for record in records:
        if record.statistic is not None:
            values.setdefault((record.role, record.domain), []).append(record.statistic)
    by_role = {role: _finite([v for key, its in values.items() if key[0] == role for v in its]) for role in ROLES}
    every = np.concatenate(list(by_role.values()))
    edges = np.linspace(min(0.0, every.min(initial=0.0)), max(every.max(initial=0.0), threshold), BINS + 1)
    ordered = sorted(values, key=lambda key: (ROLES.index(key[0]), key[1]))
    return {
        "task": task, "subject": subject, "threshold": threshold, "edges": edges.tolist(),
        "histograms": [
            {"role": role, "domain": domain, "n": len(values[role, domain]),
             "above": int((np.asarray(values[role, domain]) > threshold).sum()),
             "counts": np.histogram(_finite(values[role, domain]), edges)[0].tolist()}
            for role, domain in ordered
        ],
        "curves": {
            role: {"auroc": asdict(area_under_curve(by_role["topic"], by_role[role], seed)),
                   "points": roc_points(by_role["topic"], by_role[role])}
            for role in ("near", "far") if len(by_role["topic"]) and len(by_role[role])
        },
    }  # fmt: skip


def _finite(values: Sequence[float]) -> Columns:
    """Statistics as numbers that can be sorted and drawn: a sequence without a counted token has minus infinity."""
    return np.nan_to_num(np.asarray(values, dtype=np.float64), neginf=0.0)
