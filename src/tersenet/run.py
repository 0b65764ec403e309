"""A run's folder: what was asked for, what happened, one folder per step, the report.

    run.json  recipe.yaml  environment.json  events.jsonl  before/
    steps/00-train/{checkpoint.pt, progress/, model/, done.json}  model/  report.json  report.html

Every file is whole or absent. The same command run again finds what is done and goes on from there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tersenet import atomic
from tersenet.errors import ArtifactError, TersenetError
from tersenet.exporting.artifact import FILES as ARTIFACT_FILES
from tersenet.results import Measures, Report, StepResult
from tersenet.train import distributed

_MARK = "run.json"
# Every other file of a run, and its folders.
_FILES = (
    "recipe.yaml",
    "environment.json",
    "events.jsonl",
    "report.json",
    "report.html",
    "before/measures.json",
    "steps/*/checkpoint.pt",
    "steps/*/done.json",
    "steps/*/progress/*.pt",
    *(f"{place}/{name}" for place in ("before", "model", "steps/*/model") for name in ARTIFACT_FILES),
)
_FOLDERS = ("steps/*/model", "steps/*/progress", "steps/*", "steps", "before", "model")
_CLEARING = {"fresh": "being removed"}


class Run:
    """The folder of one run.

    Args:
        request: everything that decides the result; a folder that holds another request is refused.
        fresh: remove what an earlier run wrote, and nothing else.

    Raises:
        TersenetError: the folder holds another run, or something that is no run. On all ranks alike.
    """

    def __init__(self, folder: Path, request: dict[str, Any], *, fresh: bool = False) -> None:
        self.folder = folder
        self.writes = distributed.is_main()
        on_first_rank(lambda: self._open(json.loads(json.dumps(request, default=str)), fresh))

    def _open(self, request: dict[str, Any], fresh: bool) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise TersenetError(f"{self.folder} is a file, not a folder; choose another --out")
        mark = self.folder / _MARK
        atomic.remove_leftovers(self.folder, _MARK)
        if mark.is_file():
            for file in _FILES:
                atomic.remove_leftovers(self.folder, file)
            known = read_request(mark) if not fresh and _begun(self.folder) else None
            if known is not None and known != _CLEARING:
                check_request(self.folder, known, request)
                _drop_half_line(self.folder / "events.jsonl")
                return
            _clear(self.folder)
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            kept = ", so --fresh removes nothing" if fresh else ""
            raise TersenetError(f"{self.folder} is not empty and holds no run of tersenet{kept}; choose another --out")
        atomic.write_json(mark, request)

    def step(self, index: int, method: str) -> Path:
        return self.folder / "steps" / f"{index:02d}-{method}"

    def finished(self, index: int, method: str) -> StepResult | None:
        """The result of a step that is done, else None."""
        path = self.step(index, method) / "done.json"
        return _read(path, StepResult) if path.is_file() else None

    def finish(self, result: StepResult) -> None:
        """Mark a step as done; its model must have been saved."""
        if self.writes:
            path = self.step(result.index, result.method)
            atomic.write_text(path / "done.json", result.model_dump_json(indent=1))
            # What resume needed is not needed any more.
            (path / "checkpoint.pt").unlink(missing_ok=True)
            shutil.rmtree(path / "progress", ignore_errors=True)

    def before(self) -> Measures | None:
        path = self.folder / "before" / "measures.json"
        return _read(path, Measures) if path.is_file() else None

    def event(self, event: dict[str, Any]) -> None:
        """One line of `events.jsonl`."""
        if self.writes:
            path = self.folder / "events.jsonl"
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(event, default=str) + "\n")
            except OSError as error:
                raise atomic.unwritten(path, error) from error

    def write(self, name: str, text: str) -> None:
        if self.writes:
            atomic.write_text(self.folder / name, text)

    def report(self, report: Report) -> None:
        from tersenet.report.html import render

        self.write("report.json", report.model_dump_json(indent=1) + "\n")
        self.write("report.html", render(report))


def on_first_rank(action: Callable[[], object]) -> None:
    """Do it on the first rank while all others wait. What it refuses is refused on all, so that none waits in vain."""

    def act() -> None:
        action()

    distributed.from_first(act)


def _drop_half_line(path: Path) -> None:
    """Take away what a process that was killed while it wrote left at the end: the next line would be glued onto it."""
    try:
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    except FileNotFoundError:
        return
    except OSError as error:
        raise atomic.unwritten(path, error) from error


def _begun(folder: Path) -> bool:
    """Whether there is any result: a command that was refused before may be corrected without --fresh."""
    return any(True for file in _FILES if "/" in file for _ in folder.glob(file))


def _clear(folder: Path) -> None:
    """Remove what a run wrote, all but the mark. Killed half-way, the next call finds the mark and goes on."""
    atomic.write_json(folder / _MARK, _CLEARING)
    for file in _FILES:
        for path in folder.glob(file):
            path.unlink()
    for place in _FOLDERS:
        for path in folder.glob(place):
            # One that holds something of the user's own stays.
            with suppress(OSError):
                path.rmdir()


def read_request(mark: Path) -> Any:
    """What a folder was asked for. Raises: ArtifactError if the file is damaged."""
    try:
        return json.loads(mark.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(f"{mark} is damaged ({error}); start again with --fresh") from error


def _read(path: Path, kind: Any) -> Any:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is damaged; start again with --fresh") from error


def check_request(folder: Path, known: Any, request: Any) -> None:
    """Raises: TersenetError that names what differs between the two requests."""
    differences = list(_differences(known, request))
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise TersenetError(
            f"{folder} holds another run: {'; '.join(differences[:5])}{more}. Choose another --out, or start again "
            "with --fresh"
        )


def _differences(known: Any, asked: Any, place: str = "") -> Generator[str]:
    if isinstance(known, dict) and isinstance(asked, dict):
        for key in {**known, **asked}:  # pyright: ignore[reportUnknownVariableType]
            yield from _differences(known.get(key), asked.get(key), f"{place}.{key}" if place else str(key))
    elif isinstance(known, list) and isinstance(asked, list) and len(known) == len(asked):  # pyright: ignore
        for index, (a, b) in enumerate(zip(known, asked, strict=True)):  # pyright: ignore
            yield from _differences(a, b, f"{place}.{index}")
    elif known != asked:
        yield f"{place or 'it'} is {_short(known)} there and {_short(asked)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
