"""A result of `eval` as rows to read. Terminal, page and Markdown show these same rows, harm to neighbours first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saeguard.report.formatting import number, percent, visible

SECTIONS = (
    ("near", "Neighbouring topics", "Benign, and next to the topic: where a guardrail does harm first."),
    ("topic", "The topic", "What is to be forgotten: knowledge should fall here."),
    ("far", "Everything else", "Far from the topic: nothing should change here."),
)
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """One figure: an estimate with its interval for each subject, and each one's difference from the first."""

    task: str
    measure: str
    meaning: str
    domain: str
    n: int
    values: tuple[str, ...]
    intervals: tuple[str, ...]
    changes: tuple[str, ...]
    harmful: bool


@dataclass(frozen=True)
class Section:
    """The figures of one role: those over all its domains, and those of each domain."""

    role: str
    title: str
    note: str
    rows: tuple[Row, ...]
    domains: tuple[Row, ...]


def subject_names(result: Mapping[str, Any]) -> list[str]:
    """All subjects, the reference first."""
    return [visible(subject["name"]) for subject in result["subjects"]]


def sections(result: Mapping[str, Any]) -> list[Section]:
    """The sections that hold figures."""
    names = [subject["name"] for subject in result["subjects"]]
    meanings = {(t["name"], m["name"]): m["meaning"] for t in result["tasks"] for m in t["measures"]}
    told = [figure for figure in result["figures"] if figure["measure"] != "refused" or _refuses(result)]
    found = []
    for role, title, note in SECTIONS:
        figures = [figure for figure in told if figure["role"] == role]
        pooled = {(f["task"], f["measure"]) for f in figures if f["domain"] is None}
        whole = [f for f in figures if f["domain"] is None or (f["task"], f["measure"]) not in pooled]
        single = [f for f in figures if f["domain"] is not None and (f["task"], f["measure"]) in pooled]
        rows, domains = ([_row(f, names, meanings) for f in its] for its in (whole, single))
        if rows:
            found.append(Section(role, title, note, tuple(rows), tuple(domains)))
    return found


def _refuses(result: Mapping[str, Any]) -> bool:
    """Whether any subject refused to answer any question."""
    figures = [figure for figure in result["figures"] if figure["measure"] == "refused"]
    return any(one["value"] > 0 for figure in figures for one in figure["estimates"].values())


def _row(figure: Mapping[str, Any], names: Sequence[str], meanings: Mapping[tuple[str, str], str]) -> Row:
    estimates = [figure["estimates"].get(name) for name in names]
    differences = [figure["differences"].get(name) for name in names[1:]]
    key = (figure["task"], figure["measure"])
    return Row(
        task=figure["task"],
        measure=figure["measure"],
        meaning=figure.get("meaning") or meanings.get(key, "share of items that triggered the guardrail"),
        domain="all" if figure["domain"] is None else visible(figure["domain"]),
        n=max(one["n"] for one in estimates if one),
        values=tuple("-" if one is None else value(figure["kind"], one["value"]) for one in estimates),
        intervals=tuple("" if one is None else interval(figure["kind"], one) for one in estimates),
        changes=tuple("-" if one is None else change(figure["kind"], one) for one in differences),
        harmful=any(_is_harm(figure, one) for one in differences if one),
    )


def _is_harm(figure: Mapping[str, Any], difference: Mapping[str, Any]) -> bool:
    """Whether a difference is for the worse, and more than chance: lost knowledge off the topic, or more harm."""
    if difference["p"] >= SIGNIFICANT:
        return False
    lost = figure["sense"] == "knowledge" and figure["role"] != "topic" and difference["value"] < 0
    return bool(lost or (figure["sense"] == "harm" and difference["value"] > 0))


def value(kind: str, number_: float) -> str:
    """A share in percent, anything else as a number."""
    return percent(number_) if kind == "rate" else number(number_)


def interval(kind: str, estimate: Mapping[str, float]) -> str:
    """The 95 % interval."""
    low, high = estimate["low"], estimate["high"]
    if kind == "rate":
        return f"{100 * low:.0f} to {100 * high:.0f} %"
    return "" if low == high else f"{number(low)} to {number(high)}"


def change(kind: str, difference: Mapping[str, Any]) -> str:
    """A difference with its p-value; shares differ by points (hundredths)."""
    scale, unit = (100, " points") if kind == "rate" else (1, "")
    if difference["value"] == 0 and difference["low"] == difference["high"] == 0:
        return "none"
    p = "p < 0.001" if difference["p"] < 0.001 else f"p = {difference['p']:.2g}"
    return f"{scale * difference['value']:+.3g}{unit}, {p}"


def find(
    result: Mapping[str, Any], task: str, measure: str, role: str, *, domain: str | None = None
) -> Mapping[str, Any] | None:
    """A figure over all domains of a role (or the only one), or of one domain."""
    its = [f for f in result["figures"] if (f["task"], f["measure"], f["role"]) == (task, measure, role)]
    if domain is None:
        return next((f for f in its if f["domain"] is None), its[0] if len(its) == 1 else None)
    return next((f for f in its if f["domain"] == domain), None)


def tested(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was tested, as labels and values."""
    settings, rows = result["settings"], []
    for subject in result["subjects"]:
        model = subject["model"]
        parts = [f"{model['name'] or model['config']['model_type']} (weights {model['weights']}), {subject['dtype']}"]
        for rule in result["guardrails"].get(subject["name"], ()):
            parts.append(
                f"guardrail {subject['guardrail']}: rule {rule['name']}, {rule['gate']} gate above "
                f"{number(rule['threshold'])}, {rule['features']} features, {rule['action']} at "
                f"{number(rule['clamp']['c'])}"
            )
        rows.append((subject["name"], "; ".join(parts)))
    for task in result["tasks"]:
        counts = ", ".join(f"{count} {role}" for role, count in task["by_role"].items() if count)
        left = f"; {task['filtered']} left out by the protocol" if task["filtered"] else ""
        left += f"; {task['repeated']} repeated ones counted once" if task["repeated"] else ""
        how = ", ".join(f"{key} {shown}" for key, shown in task["settings"].items() if shown not in (None, [], ()))
        rows.append((f"task {task['name']}", f"{task['n']} items ({counts}){left}; {how}; items {task['items']}"))
    limit = f", at most {settings['limit']} of a domain" if settings["limit"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rows += [
        ("items", f"{settings['split']} side{limit}; seed {settings['seed']}"),
        ("duplicates", duplicates(result)),
        ("made with", f"{versions}; code {result['code']}"),
    ]
    return [(visible(label), visible(text)) for label, text in rows]


def duplicates(result: Mapping[str, Any]) -> str:
    """What was found of the judged items in the texts a guardrail was fitted on, and in other domains."""
    within = ""
    if result["shared"]:
        within = f"; {len(result['shared'])} stand in two domains of one task: {_listed(result['shared'])}"
    if not result["fit_text"]:
        return f"not looked for in fitted texts: no --fit-text was given{within}"
    names = ", ".join(result["fit_text"])
    if not result["duplicates"]:
        return f"no judged item stands in the fitted texts ({names}){within}"
    count = len(result["duplicates"])
    return f"{count} judged items stand in the fitted texts ({names}): {_listed(result['duplicates'])}{within}"


def _listed(found: Sequence[Mapping[str, Any]]) -> str:
    some = ", ".join(f"{one['item']} ({one['task']}, {one['domain']}, in {one['corpus']})" for one in found[:5])
    return f"{some}{', …' if len(found) > 5 else ''}"
