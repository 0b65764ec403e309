"""How a run looks while it runs: on a terminal one line that is rewritten, in a log file one line per epoch."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tersenet.cli.console import is_first, width

_BAR = 20


class Status:
    """Lines on stderr, the last of which may still change if stderr is a terminal. Silent on all but the first rank."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.silent = not is_first()
        self.live = self.stream.isatty() and not self.silent
        self.open = False

    def update(self, text: str) -> None:
        """Show `text` until the next call; only on a terminal."""
        if self.live:
            self.stream.write(f"\r{text[: width() - 1]}\x1b[K")
            self.stream.flush()
            self.open = True

    def line(self, text: str) -> None:
        """A line that stays."""
        self.close()
        if not self.silent:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        """Take the changing line away."""
        if self.open:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.open = False


class Progress:
    """Called with the events of a run. `done` says up to where it has come, for the message when it is interrupted."""

    def __init__(self, status: Status | None = None) -> None:
        self.status = status or Status()
        self.step = "training"
        self.done = "its start"
        self.validation = ""

    def __call__(self, event: dict[str, Any]) -> None:
        show = {
            "step_start": self._step_start,
            "progress": self._progress,
            "epoch": self._epoch,
            "step_done": self._step_done,
            "note": self._note,
        }.get(event["event"])
        if show is not None:
            show(event)

    def close(self) -> None:
        self.status.close()

    def _step_start(self, event: dict[str, Any]) -> None:
        self.step = f"step {event['index'] + 1}/{event['steps']} {event['method']}"
        self.validation = ""
        self.status.update(self.step)

    def _progress(self, event: dict[str, Any]) -> None:
        share = (event["epoch"] + event["step"] / event["steps"]) / event["epochs"]
        bar = "█" * round(share * _BAR)
        self.status.update(
            f"{self.step}  {bar:░<{_BAR}}  epoch {event['epoch'] + 1}/{event['epochs']}  loss {event['loss']:.4f}"
            f"{self.validation}  ETA {clock(event['eta_seconds'])}"
        )

    def _epoch(self, event: dict[str, Any]) -> None:
        number, epochs = event["epoch"] + 1, event["epochs"]
        self.done = f"epoch {number} of {epochs} of {self.step}"
        self.validation = _share("val", event.get("val_top1"))
        text = (
            f"{self.step}  epoch {number}/{epochs}  lr {event['lr']:.3g}  loss {event['train_loss']:.4f}"
            f"{_share('train', event.get('train_top1'))}{self.validation}"
            f"  {event['seconds']:.1f} s  ETA {clock(event['seconds'] * (epochs - number))}"
        )
        if self.status.live:
            self.status.update(text)
        else:
            self.status.line(text)

    def _step_done(self, event: dict[str, Any]) -> None:
        self.done = f"the end of {self.step}"
        self.status.line(f"{self.step}: done{self.validation}")

    def _note(self, event: dict[str, Any]) -> None:
        self.status.line(str(event["text"]))


def clock(seconds: float) -> str:
    """`0:34`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _share(name: str, value: float | None) -> str:
    return "" if value is None else f"  {name} {value:.2%}"
