"""The result file: one JSON with what was judged, on what, by what code, every record, and every figure.

It holds all that the report shows, so a page can be drawn again without running anything.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saeguard.choices import Role
from saeguard.corpus import Corpus
from saeguard.errors import EvaluationError
from saeguard.evaluation.duplicates import fit_duplicates, shared_items
from saeguard.evaluation.harness import Settings, TaskRun
from saeguard.evaluation.provenance import code_fingerprint, items_fingerprint, versions
from saeguard.evaluation.subject import Subject
from saeguard.evaluation.summary import figures, gate_figures
from saeguard.evaluation.task import ROLES, Record

FORMAT_VERSION = 1
EXAMPLES = 4


def make_result(
    subjects: Sequence[Subject], runs: Sequence[TaskRun], settings: Settings, fitted: Mapping[str, Corpus]
) -> dict[str, Any]:
    """Everything about a run, ready for JSON. Judged items that stand in one of the `fitted` texts are listed."""
    items = [(run.task.name, item) for run in runs for item in run.items]
    return {
        "format_version": FORMAT_VERSION,
        "code": code_fingerprint(),
        "versions": versions(),
        "settings": asdict(settings),
        "subjects": [{"name": subject.name, **subject.fingerprint} for subject in subjects],
        "guardrails": {s.name: rules_of(s) for s in subjects if s.guardrail is not None},
        "tasks": [_task(run) for run in runs],
        "figures": [row for run in runs for row in figures(run.task, run.records, settings.seed)],
        "gates": _gates(subjects, runs, settings.seed),
        "fit_text": {name: corpus.summary().fingerprint for name, corpus in fitted.items()},
        "duplicates": fit_duplicates(fitted, items),
        "shared": shared_items(items),
        "examples": [example for run in runs for example in _examples(run)],
        "records": [
            {"task": run.task.name, "subject": name, **asdict(record)}
            for run in runs
            for name, records in run.records.items()
            for record in records
        ],
    }


def write_result(result: Mapping[str, Any], path: str | Path) -> None:
    """Write the file, whole or not at all. Raises `EvaluationError`."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
        temporary.replace(target)
    except OSError as error:
        raise EvaluationError(f"cannot write the result {target}: {error}") from error


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result file. Raises `EvaluationError` for a damaged or foreign one."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        version = found["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"cannot read the result {path}: {error!r}") from error
    if version != FORMAT_VERSION:
        raise EvaluationError.mismatch(
            f"format version of {path}", found=version, expected=FORMAT_VERSION, fix="Run the evaluation again."
        )
    return dict(found)


def scores_of(result: Mapping[str, Any], task: str, domain: str, score: str) -> dict[str, float]:
    """One score of the first subject's records, by item. Raises `EvaluationError` where there is none."""
    first = result["subjects"][0]["name"]
    found = {
        record["item"]: record["scores"][score]
        for record in result["records"]
        if (record["task"], record["domain"], record["subject"]) == (task, domain, first) and score in record["scores"]
    }
    if not found:
        raise EvaluationError(f"the result has no {score} of {task} on {domain} for its first subject, {first}")
    return found


def _task(run: TaskRun) -> dict[str, Any]:
    counts = {role: sum(item.role == role for item in run.items) for role in ROLES}
    return {
        "name": run.task.name, "settings": dict(run.task.settings), "whole": run.task.whole, "n": len(run.items),
        "by_role": counts, "part": _part(run), "repeated": run.repeated, "filtered": run.filtered,
        "items": items_fingerprint(run.items),
        "measures": [asdict(measure) for measure in run.task.measures],
    }  # fmt: skip


def _part(run: TaskRun) -> dict[str, tuple[int, int]]:
    """Of each domain that was not judged in full: how many items were, and how many the published set has."""
    counts = Counter(item.domain for item in run.items)
    sizes = run.task.published().items()
    return {domain: (counts[domain], size) for domain, size in sizes if counts[domain] < size}


def rules_of(subject: Subject) -> list[dict[str, Any]]:
    """What the report says of each rule without the guardrail at hand."""
    assert subject.guardrail is not None
    return [
        {"name": rule.name, "gate": rule.gate.kind, "threshold": rule.threshold, "action": rule.action,
         "features": len(rule.features), "clamp": asdict(rule.clamp)}
        for rule in subject.guardrail.rules
    ]  # fmt: skip


def _gates(subjects: Sequence[Subject], runs: Sequence[TaskRun], seed: int) -> list[dict[str, Any]]:
    """Gate figures of the subjects whose guardrail has one rule: statistics of several do not compare."""
    found = []
    for subject in subjects:
        if subject.guardrail is None or len(subject.guardrail.rules) > 1:
            continue
        together: dict[str, list[Record]] = {}
        for run in runs:
            name = "mcq, near" if run.task.name in ("mcq", "near") else run.task.name
            its = [record for record in run.records[subject.name] if record.statistic is not None]
            together.setdefault(name, []).extend(its)
        threshold = subject.guardrail.threshold
        found += [gate_figures(task, subject.name, threshold, its, seed) for task, its in together.items() if its]
    return found


def _examples(run: TaskRun) -> list[dict[str, Any]]:
    """A few items with the answers of all subjects, triggered and not, where texts were kept."""
    by_subject = {name: {record.item: record for record in its} for name, its in run.records.items()}
    found: dict[tuple[Role, bool], list[dict[str, Any]]] = {}
    for item in sorted(run.items, key=lambda item: item.id):
        records = {name: its[item.id] for name, its in by_subject.items() if item.id in its}
        if not all("answer" in record.texts for record in records.values()) or not records:
            continue
        triggered = any(record.triggered for record in records.values())
        some = found.setdefault((item.role, triggered), [])
        if len(some) < EXAMPLES:
            first = next(iter(records.values()))
            some.append({
                "task": run.task.name, "domain": item.domain, "role": item.role, "triggered": triggered,
                "prompt": first.texts["prompt"], "reference": first.texts.get("reference", ""),
                "answers": {name: record.texts["answer"] for name, record in records.items()},
            })  # fmt: skip
    order = sorted(found, key=lambda key: (ROLES.index(key[0]), not key[1]))
    return [example for key in order for example in found[key]]
