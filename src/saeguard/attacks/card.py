"""The robustness card as one JSON file: what was attacked, how it went, every record. Pages are drawn from it alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saeguard.attacks.campaign import Campaign
from saeguard.calibration import Rate
from saeguard.errors import EvaluationError
from saeguard.evaluation.provenance import code_fingerprint, versions
from saeguard.evaluation.result import FORMAT_VERSION, read_result, rules_of
from saeguard.evaluation.task import ROLES, Record

KIND = "attack"


def make_card(campaign: Campaign) -> dict[str, Any]:
    """Everything about a campaign, ready for JSON."""
    subjects = campaign.subjects
    return {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "code": code_fingerprint(),
        "versions": versions(),
        "settings": asdict(campaign.config),
        "subjects": [{"name": subject.name, **subject.fingerprint} for subject in subjects],
        "guardrails": {s.name: rules_of(s) for s in subjects if s.guardrail is not None},
        "clean": [
            {"subject": name, "role": role, **found}
            for name, records in campaign.records["clean"].items()
            for role in ROLES
            if (found := _clean([record for record in records if record.role == role]))
        ],
        "blocked": [{"subject": name, **its.counts()} for name, its in campaign.clean.blocked.items()],
        "rows": campaign.rows,
        "curves": campaign.curves,
        "lessons": campaign.lessons,
        "left_out": campaign.left_out,
        "records": [
            {"attack": attack, "subject": name, **asdict(record)}
            for attack, by_subject in campaign.records.items()
            for name, records in by_subject.items()
            for record in records
        ],
    }


def read_card(path: str | Path) -> dict[str, Any]:
    """Read a card. Raises `EvaluationError` for a damaged file or another kind of result."""
    found = read_result(path)
    if found.get("kind") != KIND:
        raise EvaluationError(f"{path} is no result of attacks: saeguard eval --render draws those of eval")
    return found


def _clean(records: list[Record]) -> Mapping[str, Any]:
    """Accuracy and triggers in the clean form; nothing of nothing."""
    if not records:
        return {}
    triggered = [record.triggered for record in records if record.triggered is not None]
    right = Rate(sum(bool(record.scores["accuracy"]) for record in records), len(records))
    return {
        "accuracy": right.as_dict(),
        "triggered": Rate(sum(triggered), len(triggered)).as_dict() if triggered else None,
    }
