"""A diagnosis for a terminal: the verdict, then the findings, then the figures."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from saeguard.doctor.diagnosis import Diagnosis
from saeguard.doctor.figures import Corrections, Figures, Reconstruction
from saeguard.doctor.finding import Finding
from saeguard.doctor.reading import Subject
from saeguard.hookpoints import HookPoint
from saeguard.model import text_config
from saeguard.report.formatting import number, percent, visible

COLOURS = {"fits": "green", "fits with a warning": "yellow", "does not fit": "red"}
MARKS = {"mismatch": ("✗", "red"), "warning": ("!", "yellow"), "note": ("i", "cyan")}
NEAR_LAYERS = 3


def print_diagnosis(diagnosis: Diagnosis, subject: Subject, console: Console) -> None:
    """Print all of it."""
    name = getattr(text_config(subject.model), "_name_or_path", "") or type(subject.model).__name__
    place = HookPoint(subject.layer, subject.sae.hook)
    console.print()
    console.print(Text(f" {diagnosis.verdict.upper()} ", style=f"bold reverse {COLOURS[diagnosis.verdict]}"))
    console.print(Text(f"{visible(subject.sae.source or 'the SAE')}\non {place} of {visible(str(name))}", style="dim"))
    for finding in diagnosis.findings:
        _print_finding(finding, console)
    if diagnosis.figures is not None:
        console.print()
        _print_figures(diagnosis.figures, console)
        _print_texts(diagnosis.figures, console)
        _print_layers(diagnosis.figures, subject.layer, console)


def _print_finding(finding: Finding, console: Console) -> None:
    mark, colour = MARKS[finding.level]
    console.print()
    console.print(Text.assemble((f"{mark} ", f"bold {colour}"), (visible(finding.what), "bold")))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, said in (("found", finding.found), ("expected", finding.expected), ("to do", finding.fix)):
        grid.add_row(label, Text(visible(said)))
    console.print(Padding(grid, (0, 0, 0, 2)))


def _print_figures(figures: Figures, console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, said in _figures(figures):
        grid.add_row(label, Text(said))
    console.print(grid)


def _figures(figures: Figures) -> Iterator[tuple[str, str]]:
    whole, norms, features = figures.whole, figures.norms, figures.features
    yield "Explained variance", f"{whole.explained_variance:.3f}; of ordinary tokens {whole.ordinary:.3f}"
    if figures.loss_recovered is not None:
        yield "Loss recovered", f"{figures.loss_recovered:.3f}"
    said = "" if figures.declared_l0 is None else f" (its file says {number(figures.declared_l0)})"
    yield "Active features, L0", f"{whole.l0:.1f} of {features.d_sae:,}{said}"
    yield "Silent features", f"{percent(features.silent)} on {features.tokens:,} tokens"
    yield "Dense features", f"{percent(features.dense)} active at more than half of the tokens"
    if features.alignment is not None and features.aligned is not None:
        yield "Encoder and decoder", f"{percent(features.aligned)} aligned, median cosine {features.alignment:.2f}"
    special = "" if norms.special is None else f", special tokens {number(norms.special)}"
    yield "Norms", f"median {norms.median:.1f}, 5th to 95th percentile {norms.low:.1f} to {norms.high:.1f}"
    yield "", f"first token {number(norms.first)}{special}"
    yield from _trials(figures.corrections)
    for one in figures.precision:
        selected = "" if one.selected is None else f", {percent(one.selected)} of those a guardrail would select"
        yield f"{one.dtype}, {one.other}", f"{percent(one.jaccard)} of active features in common{selected}"


def _trials(tried: Corrections) -> Iterator[tuple[str, str]]:
    yield "Tried: as it is", f"explains {tried.as_is.explained_variance:.3f} of some ordinary tokens"
    yield "  input scaled", f"{tried.scale.explained_variance:.3f} at its best, times {tried.scale.value:.3g}"
    if tried.b_dec.cause == "b_dec":
        change = "more" if tried.b_dec.value < 0 else "less"
        yield "  b_dec", f"{tried.b_dec.explained_variance:.3f} with it subtracted once {change} at the input"
    if tried.layer.cause == "layer":
        yield (
            "  another layer",
            f"{tried.layer.explained_variance:.3f} at layer {tried.layer.value:g}, the best of them",
        )


def _print_texts(figures: Figures, console: Console) -> None:
    """Each text, all of them, and some of each in the chat template."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("text", "tokens", "explained", "ordinary", "cosine", "L0"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, row in figures.texts.items():
        table.add_row(Text(visible(name)), *_cells(row))
    table.add_row("all", *_cells(figures.whole), style="bold")
    if figures.chat is not None:
        table.add_row("in the chat template", *_cells(figures.chat))
    console.print()
    console.print(table)


def _cells(row: Reconstruction) -> tuple[str, ...]:
    figures = (row.explained_variance, row.ordinary, row.cosine)
    return (f"{row.tokens:,}", *(f"{value:.3f}" for value in figures), f"{row.l0:.1f}")


def _print_layers(figures: Figures, layer: int, console: Console) -> None:
    """Explained variance at this layer and around it, and at the best one."""
    by_layer = figures.corrections.by_layer
    best = max(by_layer, key=lambda other: by_layer[other])
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("layer", justify="right")
    table.add_column("explained, norms matched", justify="right")
    table.add_column("")
    for other, found in sorted(by_layer.items()):
        if abs(other - layer) <= NEAR_LAYERS or other == best:
            bar = "█" * round(20 * max(0.0, min(1.0, found)))
            table.add_row(str(other), f"{found:.3f}", bar, style="bold" if other == layer else "")
    console.print()
    console.print(table)
