"""tersenet data list | fetch"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersenet.cli.console import columns, examples, show
from tersenet.cli.options import JsonOption
from tersenet.cli.progress import Status

app = typer.Typer(help="List data sets, and download those that can be.")


@app.command("list", epilog=examples("tersenet data list", "tersenet data list --json"))
def list_data(as_json: JsonOption = False) -> None:
    """List the data sets that --data takes."""
    from tersenet.data.registry import NAMES

    own = {"package.module:function": "your own function, called without arguments: returns (train, test) loaders"}
    document = {"data": [{"name": name, "description": text} for name, text in NAMES.items()]}
    show(document, lambda: columns(("DATA", "WHAT IT IS"), (NAMES | own).items()), as_json)


@app.command(epilog=examples("tersenet data fetch cifar10 data/cifar10"))
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="cifar10 or cifar100.", show_default=False)],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Download a data set, check its checksum and unpack it."""
    from tersenet.data.fetch import fetch as download

    status = Status()
    try:
        download(name, folder, _Download(name, status))
    finally:
        status.close()
    document = {"data": name, "folder": str(folder)}
    show(document, lambda: f"{name} is in {folder}; use it with --data {name}:{folder}", as_json)


class _Download:
    """Called with the bytes that are there: on a terminal always shown, in a log file at every tenth."""

    def __init__(self, name: str, status: Status) -> None:
        self.name = name
        self.status = status
        self.tenths = 0

    def __call__(self, done: int, total: int | None) -> None:
        of = f" of {total / 1e6:.0f}" if total else ""
        text = f"{self.name}: {done / 1e6:.0f}{of} MB"
        tenths = 10 * done // total if total else 0
        if self.status.live:
            self.status.update(text)
        elif tenths > self.tenths:
            self.status.line(text)
        self.tenths = tenths
