"""Which columns of a training log belong in one chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Point = tuple[float, float]

_NOT_CURVES = ("epoch", "step", "seconds")
_TITLES = {
    "lr": "Learning rate",
    "rate": "Pruning rate",
    "churn": "Mask churn",
    "saved": "Saved by groups",
    "strength": "Coefficient of the regulariser",
}
_SHARED = {"loss": "Loss", "top1": "Top-1", "top5": "Top-5"}


@dataclass
class Panel:
    """One chart: lines of (epoch, value) under the names of their columns. `percent`: the values are shares."""

    title: str
    percent: bool = False
    lines: dict[str, list[Point]] = field(default_factory=dict)


def panels(rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """Top-1 (and top-5) first, then losses, then every other numeric column by itself, in the log's order.

    A value that is missing or not finite is a gap; a column without any number is left out.
    """
    found: dict[str, Panel] = {}
    for column in dict.fromkeys(key for row in rows for key in row):
        line = [_point(row, column, at) for at, row in enumerate(rows)]
        if column in _NOT_CURVES or all(math.isnan(value) for _, value in line):
            continue
        ending = column.rpartition("_")[2]
        title = _SHARED.get(ending) or _TITLES.get(column) or column.replace("_", " ").capitalize()
        panel = found.setdefault(title, Panel(title, percent=ending in ("top1", "top5")))
        panel.lines[column] = line
    for panel in found.values():  # what was held out is the line to look at: it gets the first colour
        panel.lines = dict(sorted(panel.lines.items(), key=lambda named: named[0].startswith("train")))
    return sorted(found.values(), key=lambda panel: (not panel.percent, panel.title != "Loss"))


def last_value(line: Sequence[Point]) -> float:
    """The last value that is there."""
    return next(value for _, value in reversed(line) if not math.isnan(value))


def _point(row: dict[str, Any], column: str, at: int) -> Point:
    epoch = _number(row.get("epoch"))
    return (at if math.isnan(epoch) else epoch), _number(row.get(column))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)
