"""The analysis on a terminal: one row per channel group, one column per rate."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tersenet.report import format as f
from tersenet.search import words
from tersenet.search.result import Sensitivity

_FIXED, _RATE, _NAME = 27, 8, 32  # columns of the terminal: all but the name, one rate, the longest name on one line


def render_text(result: Sensitivity, width: int = 100) -> str:
    """Table, notes and what was left out, as plain text of `width` columns."""
    console = Console(width=width, color_system=None, force_terminal=False, legacy_windows=False)
    lines = [Text(f"Note: {f.clean(note)}") for note in result.notes]
    lines += [Text(f"Left out: {f.clean(', '.join(names))}: {f.clean(why)}") for why, names in result.skipped.items()]
    title = Text(f.clean(f"{result.model}  {result.data}"), style="bold")
    with console.capture() as captured:
        console.print(Group(title, Text(words.baseline(result)), "", _table(result, width), "", *lines))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def _table(result: Sensitivity, width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False, collapse_padding=True)
    table.add_column("layer", overflow="fold")
    count = len(result.layers[0].points)
    # Evenly chosen where there are more than fit; the page and the JSON have them all.
    fit = max(1, (width - _FIXED - min(_NAME, max(len(layer.name) for layer in result.layers))) // _RATE)
    step = -(-count // fit)
    shown = range((count - 1) % step, count, step)
    heads = words.rate_heads([result.layers[0].points[at].rate for at in shown])
    for head in ("channels", "MACs", *heads):
        table.add_column(head, justify="right", no_wrap=True)
    rates = [result.layer_rate(layer, words.ALLOWED) for layer in result.layers] if result.score == "top1" else None
    if rates is not None:
        table.add_column("1 point", justify="right", no_wrap=True)
    for row, layer in enumerate(result.layers):
        cells = [str(layer.channels), f"{100 * layer.macs_share:.1f} %"]
        cells += [words.change(result, layer.points[at]) for at in shown]
        cells += words.rate_heads([rates[row]]) if rates is not None else []
        table.add_row(Text(f.clean(layer.name)), *(Text(cell) for cell in cells))
    return table
