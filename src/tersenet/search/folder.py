"""The folder of an analysis: what was asked for, one line per measured point, and what came out.

    sensitivity_request.json  sensitivity_points.jsonl  sensitivity.json  sensitivity.html

A point is on disk as soon as it is measured, so that the same command goes on behind the last one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tersenet import atomic
from tersenet.errors import ArtifactError, TersenetError
from tersenet.results import Accuracy
from tersenet.run import check_request, read_request

MARK, POINTS = "sensitivity_request.json", "sensitivity_points.jsonl"
RESULT, PAGE = "sensitivity.json", "sensitivity.html"


class Row(BaseModel):
    """A line of `sensitivity_points.jsonl`. `layer` is None for the whole network."""

    model_config = ConfigDict(extra="forbid")

    layer: str | None
    rate: float
    accuracy: Accuracy


class Folder:
    """Measured points, on disk and in memory; in memory only without a `path`.

    Args:
        request: everything that decides the points, as JSON gives it back. A folder that holds another is refused.
        fresh: remove what an earlier analysis left, and nothing else.

    Raises:
        TersenetError: the folder holds another analysis, or something else.
        ArtifactError: its files are damaged. A last line that was not written to its end is dropped.
    """

    def __init__(self, path: Path | None, request: dict[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.known: dict[tuple[str | None, float], Accuracy] = {}
        if path is not None:
            self._open(path, request, fresh)

    def add(self, layer: str | None, rate: float, accuracy: Accuracy) -> None:
        """Keep one point.

        Raises:
            TersenetError: a full disk, or a folder that can't be written.
        """
        self.known[layer, rate] = accuracy
        if self.path is None:
            return
        points = self.path / POINTS
        try:
            with points.open("a", encoding="utf-8") as file:
                file.write(Row(layer=layer, rate=rate, accuracy=accuracy).model_dump_json() + "\n")
        except OSError as error:
            raise atomic.unwritten(points, error) from error

    def write(self, name: str, text: str) -> None:
        if self.path is not None:
            atomic.write_text(self.path / name, text)

    def _open(self, path: Path, request: Any, fresh: bool) -> None:
        if path.exists() and not path.is_dir():
            raise TersenetError(f"{path} is a file, not a folder; choose another --out")
        mark = path / MARK
        for name in (MARK, RESULT, PAGE):
            atomic.remove_leftovers(path, name)
        # Without its mark a folder is not ours: then nothing in it is touched.
        if not mark.is_file() and path.is_dir() and any(path.iterdir()):
            raise TersenetError(f"{path} is not empty and holds no sensitivity analysis; choose another --out")
        if fresh:
            for name in (POINTS, RESULT, PAGE):
                (path / name).unlink(missing_ok=True)
        rows = _rows(path / POINTS)
        if rows:
            check_request(path, read_request(mark), request)
            self.known = {(row.layer, row.rate): row.accuracy for row in rows}
        else:
            atomic.write_json(mark, request)


def _rows(points: Path) -> list[Row]:
    """Every whole line; what a killed process left behind the last one is cut off, since more lines follow."""
    try:
        content = points.read_bytes()
    except FileNotFoundError:
        return []
    rows: list[Row] = []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("it has no end")
            rows.append(Row.model_validate_json(line))
        except (ValidationError, ValueError) as error:
            if number < len(lines):
                raise ArtifactError(f"{points}:{number} is damaged; start again with --fresh") from error
            os.truncate(points, len(content) - len(line))
    return rows
