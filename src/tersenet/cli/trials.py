"""What the commands share that evaluate many small networks before anything is pruned: options, progress, folder."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tersenet.cli.console import fail
from tersenet.cli.progress import Status, clock

SplitOption = Annotated[
    str | None,
    typer.Option("--split", metavar="S", help="validation, train or test; validation by default, if there is one."),
]
IncludeOption = Annotated[
    list[str] | None, typer.Option("--include", metavar="PATTERN", help="Only these layers; repeatable.")
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Not these layers; repeatable.")
]


class TrialProgress(ABC):
    """Called with the events of a search. `done` of `of` trials are known. What has a `problem` keeps its line."""

    def __init__(self, status: Status | None = None) -> None:
        self.status = status or Status()
        self.done, self.of = 0, 0

    def __call__(self, event: dict[str, Any]) -> None:
        self.done, self.of = event["done"], event["of"]
        left = "" if event["eta_seconds"] is None else f"  ETA {clock(event['eta_seconds'])}"
        if event["event"] == "start":
            self.status.line(f"{self.started(event)}{left}")
            return
        text = f"{self.done}/{self.of}  {self.trial(event)}{left}"
        if event.get("problem"):
            self.status.line(text)
        elif self.status.live:
            self.status.update(text)
        elif self.worth_a_line(event):
            self.status.line(text)

    @abstractmethod
    def started(self, event: dict[str, Any]) -> str:
        """What the search is about to do."""

    @abstractmethod
    def trial(self, event: dict[str, Any]) -> str:
        """What one trial gave."""

    @abstractmethod
    def worth_a_line(self, event: dict[str, Any]) -> bool:
        """In a log file, where lines stay."""


@contextmanager
def interruptible(progress: TrialProgress, trials: str) -> Generator[None]:
    """Ctrl-C ends the command with status 130 and says that it goes on after so many `trials`."""
    try:
        yield
    except KeyboardInterrupt:
        progress.status.close()
        fail(f"interrupted; the same command goes on after {progress.done} of {progress.of} {trials}", 130)
    finally:
        progress.status.close()


def folder_for(command: str, model: str, out: Path | None) -> Path:
    """`out`, or runs/COMMAND-MODEL."""
    return out or Path("runs") / re.sub(r"[^\w.-]+", "_", f"{command}-{model}")
