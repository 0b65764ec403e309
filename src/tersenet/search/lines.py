"""A folder that a search writes line by line: what was asked for, one line per result, and what came out.

A line is on disk as soon as its result is known, so that the same command goes on behind the last one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from tersenet import atomic
from tersenet.errors import ArtifactError, TersenetError
from tersenet.run import check_request, read_request

Row = TypeVar("Row", bound=BaseModel)


@dataclass(frozen=True)
class Names:
    """The files, and `what` the folder holds, for messages."""

    what: str
    mark: str
    lines: str
    results: tuple[str, ...]


class Lines(Generic[Row]):
    """Rows, on disk and in `rows`; in memory only without a `path`.

    Args:
        request: everything that decides the rows, as JSON gives it back. A folder that holds another is refused.
        fresh: remove what an earlier search left, and nothing else.

    Raises:
        TersenetError: the folder holds another search, or something else.
        ArtifactError: its files are damaged. A last line that was not written to its end is dropped.
    """

    def __init__(
        self, path: Path | None, names: Names, kind: type[Row], request: dict[str, Any], *, fresh: bool = False
    ) -> None:
        self.path, self.names = path, names
        self.rows: list[Row] = []
        if path is not None:
            self._open(path, kind, request, fresh)

    def add(self, row: Row) -> None:
        """Keep one row.

        Raises:
            TersenetError: a full disk, or a folder that can't be written.
        """
        if self.path is not None:
            lines = self.path / self.names.lines
            try:
                with lines.open("a", encoding="utf-8") as file:
                    file.write(row.model_dump_json() + "\n")
            except OSError as error:
                raise atomic.unwritten(lines, error) from error
        self.rows.append(row)

    def write(self, name: str, text: str) -> None:
        if self.path is not None:
            atomic.write_text(self.path / name, text)

    def _open(self, path: Path, kind: type[Row], request: Any, fresh: bool) -> None:
        if path.exists() and not path.is_dir():
            raise TersenetError(f"{path} is a file, not a folder; choose another --out")
        mark = path / self.names.mark
        for name in (self.names.mark, *self.names.results):
            atomic.remove_leftovers(path, name)
        # Without its mark a folder is not ours: then nothing in it is touched.
        if not mark.is_file() and path.is_dir() and any(path.iterdir()):
            raise TersenetError(f"{path} is not empty and holds no {self.names.what}; choose another --out")
        if fresh:
            for name in (self.names.lines, *self.names.results):
                (path / name).unlink(missing_ok=True)
        self.rows = _whole_lines(path / self.names.lines, kind)
        if self.rows:
            check_request(path, read_request(mark), request)
        else:
            atomic.write_json(mark, request)


def _whole_lines(path: Path, kind: type[Row]) -> list[Row]:
    """Every whole line; what a killed process left behind the last one is cut off, since more lines follow."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    rows: list[Row] = []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("it has no end")
            rows.append(kind.model_validate_json(line))
        except (ValidationError, ValueError) as error:
            if number < len(lines):
                raise ArtifactError(f"{path}:{number} is damaged; start again with --fresh") from error
            os.truncate(path, len(content) - len(line))
    return rows
