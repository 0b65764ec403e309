"""Runtimes beside each other: horizontal bars, medians with their quartiles."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tersenet import atomic
from tersenet.errors import TersenetError

if TYPE_CHECKING:
    from tersenet.lowering.bench import Timing

SUFFIXES = (".svg", ".png")
_COLUMNS = 4  # panels in a row
_OURS, _PEERS = "#1f6f8b", "#b9c2c8"


def check_picture(path: Path) -> None:
    """Raises: TersenetError for another ending than `SUFFIXES`."""
    if path.suffix not in SUFFIXES:
        raise TersenetError(f"the picture {path} must end in {' or '.join(SUFFIXES)}")


def draw(panels: Mapping[str, Mapping[str, Timing]], path: Path) -> None:
    """One panel for each title -> runtime -> its times, fastest on top, written to `path`.

    Raises: TersenetError for another ending, or where the file can't be written.
    """
    check_picture(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    most = max(len(timings) for timings in panels.values())
    # Text stays text, and ids don't change from run to run.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tersenet", "font.size": 9}):
        figure = Figure(figsize=(3.4 * columns, (0.26 * most + 0.7) * rows), layout="constrained")
        for number, (title, timings) in enumerate(panels.items()):
            axes = figure.add_subplot(rows, columns, number + 1)
            order = sorted(timings, key=lambda name: -timings[name].median_ms)
            times = [timings[name] for name in order]
            spread = [[t.median_ms - t.low_ms for t in times], [t.high_ms - t.median_ms for t in times]]
            colours = [_OURS if name == "tersenet" else _PEERS for name in order]
            axes.barh(order, [t.median_ms for t in times], xerr=spread, color=colours, height=0.7)
            for place, time in enumerate(times):
                axes.annotate(
                    f"{time.median_ms:.3g}", (time.high_ms, place), (4, 0), textcoords="offset points", va="center"
                )
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xlabel("ms")
            axes.set_xlim(0, 1.25 * max(t.high_ms for t in times))
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        kind = path.suffix[1:]
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    atomic.write_bytes(path, buffer.getvalue())
