"""What a guardrail does not do, in plain words: each sentence from a figure of the result, or true of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeguard.report.evaluation_view import find
from saeguard.report.formatting import percent, visible

SMALL = 100
CATCHING = {
    "mcq": "questions",
    "near": "questions",
    "open": "questions asked openly",
    "perplexity": "texts",
    "muse": "MUSE items",
    "tofu": "TOFU questions",
}


def limits(result: Mapping[str, Any]) -> list[str]:
    """Sentences for the end of a report."""
    says = [
        sentence
        for name in (() if "comparison" in result else result["guardrails"])
        for sentence in (*_leaks(result, name), *_harm(result, name), *_broken(result, name), *_changed(result, name))
    ]
    if result["guardrails"]:
        says += [
            "It removes nothing from the weights: whoever holds them can run the model without the guardrail.",
            "It was judged on ordinary questions and text. Someone who sets out to get round it, with paraphrase, "
            "other languages, ciphers or padding, may succeed; that is not measured here.",
        ]
    if not any(task["name"] == "near" or task["by_role"]["near"] for task in result["tasks"]):
        says.append("Nothing here was asked about neighbouring topics, so harm to them has not been tested.")
    return [*says, *_parts(result), *_small(result)]


def _leaks(result: Mapping[str, Any], name: str) -> list[str]:
    """What of the topic gets past."""
    passed = []
    for task, what in CATCHING.items():
        one = _estimate(result, task, "triggered", "topic", name)
        if one and one["value"] < 1:
            passed.append(f"{one['n'] - round(one['value'] * one['n'])} of {one['n']} {what}")
    says = []
    if passed:
        says.append(f"{visible(name)} does not catch everything. On the topic these passed: {', '.join(passed)}.")
    right = _estimate(result, "open", "match", "topic", name)
    if right and right["value"] > 0:
        says.append(f"{visible(name)} still lets {percent(right['value'])} of the topic's open answers be right.")
    return says


def _harm(result: Mapping[str, Any], name: str) -> list[str]:
    """Where else it acts."""
    says = []
    for role, where in (("near", "neighbouring topics"), ("far", "other topics")):
        hits = []
        for task, what in CATCHING.items():
            one = _estimate(result, task, "triggered", role, name)
            if one and one["value"] > 0:
                hits.append(f"{round(one['value'] * one['n'])} of {one['n']} {what}")
        if hits:
            says.append(f"{visible(name)} also acts on {where}. These triggered: {', '.join(hits)}.")
    return says


def _broken(result: Mapping[str, Any], name: str) -> list[str]:
    one = _estimate(result, "open", "gibberish", "topic", name)
    refused = _estimate(result, "open", "refusal", "topic", name)
    if not one or not one["value"]:
        return []
    polite = f", {percent(refused['value'])} are refusals" if refused else ""
    share = f"{percent(one['value'])} of answers on the topic are gibberish{polite}"
    return [f"{visible(name)} does not decline politely: {share}."]


def _changed(result: Mapping[str, Any], name: str) -> list[str]:
    rates = [_estimate(result, "perplexity", "changed", role, name) for role in ("topic", "near", "far")]
    hits = sum(round(one["value"] * one["n"]) for one in rates if one)
    return [f"{visible(name)} changed {hits} texts that did not trigger. That must not be: report it."] if hits else []


def _parts(result: Mapping[str, Any]) -> list[str]:
    """Published sets that were judged in part."""
    says = []
    for task in result["tasks"]:
        parts = [f"{n} of {size} items of {visible(domain)}" for domain, (n, size) in task.get("part", {}).items()]
        if parts:
            says.append(f"{task['name']} was judged on a part of the published set, so its figures are not comparable "
                        f"with published ones: {', '.join(parts)}.")  # fmt: skip
    return says


def _small(result: Mapping[str, Any]) -> list[str]:
    counts = [(task["name"], role, n) for task in result["tasks"] for role, n in task["by_role"].items()]
    few = [f"{task} ({role}, {n})" for task, role, n in counts if 0 < n < SMALL]
    if not few:
        return []
    return [f"The figures are not exact, least of all those of few items: {', '.join(few)}. Read the intervals."]


def _estimate(result: Mapping[str, Any], task: str, measure: str, role: str, name: str) -> Mapping[str, Any] | None:
    figure = find(result, task, measure, role)
    found: Mapping[str, Any] | None = None if figure is None else figure["estimates"].get(name)
    return found
