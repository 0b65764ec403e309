"""What commands print: their result on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

command: list[str] = ["tersenet"]
"""The command line that runs, for reports; set when it starts."""


def is_first() -> bool:
    """Whether this is the process that speaks: under torchrun there are several."""
    return os.environ.get("RANK", "0") == "0"


def show(document: dict[str, Any], text: Callable[[], str], as_json: bool) -> None:
    """The result on stdout: `document` as the one JSON document, or `text()` for people."""
    if is_first():
        print(json.dumps(document, indent=2, ensure_ascii=False) if as_json else text())


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def note_random_weights(model: str, weights: str | None) -> None:
    """Say it where a network was built by name without weights: its accuracy, and what is exported, mean nothing."""
    from tersenet.models.registry import ENTRIES, in_zoo

    if weights is None and (model in ENTRIES or in_zoo(model)) and is_first():
        note(f"note: the weights of {model} are random; --weights FILE loads trained ones")


def fail(text: str, code: int) -> NoReturn:
    note(text)
    raise SystemExit(code)


def width() -> int:
    """Columns of the terminal; 100 where there is none, as in a log file."""
    return shutil.get_terminal_size((100, 24)).columns


def columns(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table: left-aligned columns, two spaces apart, the last one free."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def examples(*lines: str) -> str:
    """The epilog of a command's help. Brackets are escaped: rich reads them as markup."""
    return "[bold]Examples[/bold]\n\n" + "\n".join("  " + line.replace("[", r"\[") for line in lines)
