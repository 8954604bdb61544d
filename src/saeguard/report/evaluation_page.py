"""The report of an evaluation as one HTML page, and the same as Markdown: drawn from a result alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saeguard.errors import EvaluationError
from saeguard.report import evaluation_plots as plots
from saeguard.report.comparison_view import comparison_tables, frontiers, tried_plots
from saeguard.report.evaluation_limits import limits
from saeguard.report.evaluation_view import Row, find, sections, subject_names, tested, value
from saeguard.report.formatting import lines, visible
from saeguard.report.markdown import markdown_table
from saeguard.report.plots import scoped
from saeguard.report.sweep_view import ROLES, sweep_plots, sweep_table
from saeguard.report.template import filled, written

TILES = (
    ("near", "accuracy", "near", "accuracy on neighbours"),
    ("mcq", "accuracy", "topic", "accuracy on the topic"),
    ("mcq", "accuracy", "far", "accuracy elsewhere"),
    ("open", "match", "topic", "open answers on the topic that are right"),
    ("open", "gibberish", "topic", "open answers on the topic that are gibberish"),
)
ANSWERS = ((("near", "mcq"), "accuracy", "right answers"), (("open",), "match", "open answers that match"))
EXAMPLES = 8


def write_report(result: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page, or Markdown where the name ends in `.md`. Raises `EvaluationError` where it cannot be written."""
    text = render_markdown(result) if Path(path).suffix == ".md" else render_page(result)
    return written(text, path, "the report", EvaluationError)


def render_page(result: Mapping[str, Any]) -> str:
    """The page as text."""
    found = sections(result)
    return filled(
        "evaluation.html.j2", {"lines": lines, "visible": visible}, **_heading(result), sections=found,
        tiles=_tiles(result), meanings=_meanings(found), plots=_marked("p", _plots(result)),
        frontiers=_marked("f", frontiers(result)), sweep=sweep_table(result),
        comparison=comparison_tables(result),
        examples=_examples(result), kept=result["settings"]["keep_text"], limits=limits(result), tested=tested(result),
    )  # fmt: skip


def render_markdown(result: Mapping[str, Any]) -> str:
    """The tables, limits and provenance as Markdown."""
    heading, found = _heading(result), sections(result)
    lines = [f"# {heading['title']}", "", heading["lead"], ""]
    for table in comparison_tables(result):
        lines += [f"## {table['title']}", "", table["note"], "", *markdown_table(table["head"], table["rows"]), ""]
    for section in found:
        lines += [f"## {section.title}", "", section.note, "", *_table(section.rows, heading["subjects"]), ""]
        if section.domains:
            lines += ["### Each domain", "", *_table(section.domains, heading["subjects"]), ""]
    if (sweep := sweep_table(result)) is not None:
        marked = [(*row["cells"][:-1], row["cells"][-1] + " (chosen)" * row["chosen"]) for row in sweep["rows"]]
        lines += ["## The sweep", "", sweep["note"], "", *markdown_table(sweep["head"], marked), ""]
    lines += ["## What the measures mean", "", *(f"- **{name}**: {meaning}" for name, meaning in _meanings(found)), ""]
    lines += ["## What this does not do", "", *(f"- {sentence}" for sentence in limits(result)), ""]
    lines += ["## What was tested", "", *(f"- {label}: {text}" for label, text in tested(result)), ""]
    return "\n".join(lines)


def _heading(result: Mapping[str, Any]) -> dict[str, Any]:
    names = subject_names(result)
    title = _title(result)
    against = f"Each subject answers the same items in the same way; differences are from {names[0]}."
    side = {"test": "Figures are of the test items; settings may only be chosen on the others.",
            "dev": "These are dev items: figures to choose settings by, not to report.",
            "all": "All items are used, those too on which settings may have been chosen."}  # fmt: skip
    return {"title": title, "lead": f"{against} {side[result['settings']['split']]}", "subjects": names}


def _title(result: Mapping[str, Any]) -> str:
    if "comparison" in result:
        return f"Compared: {', '.join(map(visible, result['comparison']['methods']))}"
    guarded = [visible(name) for name in result["guardrails"]]
    if guarded:
        return f"What {', '.join(guarded)} forgets and what else it changes"
    return f"How {', '.join(subject_names(result))} does"


def _tiles(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The main figures of the first guarded subject: before and after."""
    subject = next(iter(result["guardrails"]), None)
    reference, found = result["subjects"][0]["name"], []
    for task, measure, role, label in TILES:
        figure = find(result, task, measure, role)
        if (
            "comparison" in result
            or subject is None
            or figure is None
            or not {subject, reference} <= set(figure["estimates"])
        ):
            continue
        before, after = (value(figure["kind"], figure["estimates"][name]["value"]) for name in (reference, subject))
        found.append((after if before == after else f"{before} → {after}", label))
    return found


def _meanings(found: Sequence[Any]) -> list[tuple[str, str]]:
    rows = [row for section in found for row in (*section.rows, *section.domains)]
    return list({f"{row.task}, {row.measure}": row.meaning for row in rows}.items())


def _marked(prefix: str, made: Sequence[tuple[str, str]]) -> list[tuple[str, Markup]]:
    """Captions and pictures for the page. They are SVG of our own making, escaped by matplotlib."""
    return [(caption, Markup(scoped(svg, f"{prefix}{i}"))) for i, (caption, svg) in enumerate(made)]


def _plots(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    compared = "comparison" in result
    made = tried_plots(result) if compared else [*_answers(result), *_frontier(result), *sweep_plots(result)]
    for gate in () if compared else result["gates"]:
        name = f"{visible(gate['subject'])}, task {gate['task']}"
        if gate["curves"]:
            made.append((f"How well the gate tells the topic from the rest: {name}", plots.roc(gate)))
        made.append((f"Gate statistic per domain (square root scale): {name}", plots.statistics(gate)))
    return made


def _answers(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Right answers before and after, per domain, for each guarded subject."""
    reference = result["subjects"][0]["name"]
    made = []
    for subject in result["guardrails"]:
        for tasks, measure, label in ANSWERS:
            its = [f for f in result["figures"] if f["task"] in tasks and f["measure"] == measure and f["domain"]]
            if its:
                ordered = sorted(its, key=lambda figure: ROLES.index(figure["role"]))
                caption = f"{label.capitalize()}: unguarded in grey, {visible(subject)} in colour"
                made.append((caption, plots.before_after(ordered, reference, subject, label)))
    return made


def _frontier(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every subject by what it still knows of the topic and of the rest; of three subjects or more."""
    topic, far = (find(result, "mcq", "accuracy", role) for role in ("topic", "far"))
    if topic is None or far is None or len(result["subjects"]) < 3:
        return []
    points = [
        plots.Point(visible(name), plots.ranged(far["estimates"][name]), plots.ranged(topic["estimates"][name]))
        for name in topic["estimates"]
    ]
    return [("Forgetting against utility: down and to the right is better", plots.frontier(points))]


def _examples(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Open answers first: of each role a few that triggered and a few that did not."""
    found = sorted(result["examples"], key=lambda example: example["task"] != "open")
    kept: dict[tuple[str, bool], list[Mapping[str, Any]]] = {}
    for example in found:
        kept.setdefault((example["role"], example["triggered"]), []).append(example)
    return [example for some in kept.values() for example in some[:2]][:EXAMPLES]


def _table(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    head = ["task", "measure", "domain", "n", *names, *(f"{name} − {names[0]}" for name in names[1:])]
    cells = [
        [row.task, row.measure, row.domain, str(row.n),
         *(f"{v} ({i})" if i else v for v, i in zip(row.values, row.intervals, strict=True)), *row.changes]
        for row in rows
    ]  # fmt: skip
    return markdown_table(head, cells)
