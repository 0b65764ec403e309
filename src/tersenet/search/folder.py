"""The folder of a sensitivity analysis: what was asked for, one line per measured point, and what came out.

sensitivity_request.json  sensitivity_points.jsonl  sensitivity.json  sensitivity.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tersenet.results import Accuracy
from tersenet.search.lines import Lines, Names

MARK, POINTS = "sensitivity_request.json", "sensitivity_points.jsonl"
RESULT, PAGE = "sensitivity.json", "sensitivity.html"
_NAMES = Names("sensitivity analysis", MARK, POINTS, (RESULT, PAGE))


class Row(BaseModel):
    """A line of `sensitivity_points.jsonl`. `layer` is None for the whole network."""

    model_config = ConfigDict(extra="forbid")

    layer: str | None
    rate: float
    accuracy: Accuracy | None


class Folder:
    """Measured points, on disk and in memory; see `Lines`."""

    def __init__(self, path: Path | None, request: dict[str, Any], *, fresh: bool = False) -> None:
        self._lines = Lines(path, _NAMES, Row, request, fresh=fresh)
        self.known = {(row.layer, row.rate): row.accuracy for row in self._lines.rows}

    def add(self, layer: str | None, rate: float, accuracy: Accuracy | None) -> None:
        """Keep one point; without an accuracy, one whose loss or metric was not finite.

        Raises:
            TersenetError: a full disk, or a folder that can't be written.
        """
        self._lines.add(Row(layer=layer, rate=rate, accuracy=accuracy))
        self.known[layer, rate] = accuracy

    def write(self, name: str, text: str) -> None:
        self._lines.write(name, text)
