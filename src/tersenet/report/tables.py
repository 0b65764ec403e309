"""The report on a terminal: figures before and after, and one row per layer."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersenet.report import format as f
from tersenet.report.summary import Figure, figures, footnotes, target_met
from tersenet.results import LayerRow, Report, StepResult

_STYLES = {True: "green", False: "yellow", None: ""}


def before_after(report: Report) -> RenderableType:
    """The headline figures before and after, how they were obtained, the checks of equality and the notes."""
    return Group(_title(report), "", _figures(report), "", *_remarks(report), "")


def per_layer(report: Report) -> RenderableType:
    """One row per convolution and linear layer: its channels and MACs; a pair where the run changed them."""
    table = _table("layer")
    # Of the columns only the name gives way, where the terminal is narrow.
    table.columns[0].no_wrap = False
    table.add_column("kind", no_wrap=True)
    for heading in ("in", "out", "MACs before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.layers:
        table.add_row(*(Text(cell) for cell in _layer_cells(row)))
    return table


def fitted(step: StepResult) -> RenderableType:
    """One row per layer that a step fitted to calibration data: what it has left, and errors of its responses and, at
    that point, of the network's output."""
    table = _table(f"step {step.index + 1}: fitted")
    table.columns[0].no_wrap = False
    table.add_column("", no_wrap=True)
    for heading in ("left", "error unfitted", "fitted", "of the output"):
        table.add_column(heading, justify="right", no_wrap=True)
    for fit in step.fits:
        errors = (f.share(fit.unfitted), f.share(fit.error), f.share(fit.output_error))
        row = (f.clean(fit.name), f.clean(fit.what), _pair(fit.before, fit.after), *errors)
        table.add_row(*(Text(cell) for cell in row))
    return table


def render_text(report: Report, width: int = 100) -> str:
    """All tables as plain text of `width` columns."""
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        fits = [fitted(step) for step in report.steps if step.fits]
        console.print(before_after(report), per_layer(report), *fits, sep="\n")
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _title(report: Report) -> Text:
    parts = [report.model, str(report.recipe.get("name") or ""), report.data]
    # Text, not markup: a name like "[red]" is printed as it is.
    return Text("  ".join(f.clean(part) for part in parts if part), style="bold")


def _figures(report: Report) -> Table:
    table = _table("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures(report):
        table.add_row(*_figure_cells(figure))
    return table


def _figure_cells(figure: Figure) -> tuple[Text, Text, Text, Text]:
    change = Text(figure.change, style=_STYLES[figure.good])
    before, after = Text(figure.before.text), Text(figure.after.text, style="bold")
    if figure.before.spread or figure.after.spread:
        before.append(f"\n{figure.before.spread}", style="dim")
        after.append(f"\n{figure.after.spread}", style="dim not bold")
    return Text(figure.label), before, after, change


def _remarks(report: Report) -> list[RenderableType]:
    lines = [Text(note, style="dim") for note in footnotes(report)]
    met = target_met(report)
    if report.target is not None:
        verdict = {True: ": met", False: ": missed", None: ""}[met]
        lines.append(Text(f"Target {f.clean(report.target)}{verdict}.", style=_STYLES[met]))
    for step in report.steps:
        check = step.equality
        if check is not None:
            equal = check.relative <= check.tolerance
            text = (
                f"Step {step.index + 1} ({f.clean(step.method)}): compact and masked network "
                f"{'agree' if equal else 'DIFFER'} on {check.samples:,} samples, "
                f"largest difference {check.relative:.1e} of the largest output (tolerance {check.tolerance:.0e})."
                f"{check.remark}"
            )
            lines.append(Text(text, style=_STYLES[equal]))
    notes = [*report.notes, *(note for step in report.steps for note in step.notes)]
    return [*lines, *(Text(f"Note: {f.clean(note)}") for note in notes)]


def _table(first: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False, collapse_padding=True)
    table.add_column(first, overflow="ellipsis", no_wrap=True)
    return table


def _layer_cells(row: LayerRow) -> tuple[str, ...]:
    kind = f.clean(row.kind) + (f" ({f.clean(row.note)})" if row.note else "")
    return (
        f.clean(row.name) or "(model)",
        kind,
        _pair(row.in_before, row.in_after),
        _pair(row.out_before, row.out_after),
        f.count(row.macs_before),
        f.count(row.macs_after),
        f.change(row.macs_before, row.macs_after),
    )


def _pair(before: int, after: int) -> str:
    return str(after) if before == after else f"{before} -> {after}"
