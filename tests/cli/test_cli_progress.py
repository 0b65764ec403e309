"""What a run shows while it runs."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from tersenet.cli.progress import Progress, Status, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


EVENTS = [
    {"event": "step_start", "index": 1, "steps": 2, "method": "soft_filter_pruning"},
    {"event": "progress", "epoch": 0, "epochs": 4, "step": 5, "steps": 10, "loss": 0.5, "lr": 0.1, "eta_seconds": 61},
    {"event": "epoch", "epoch": 1, "epochs": 4, "lr": 0.1, "train_loss": 0.25, "val_top1": 0.9712, "seconds": 2.5},
    {"event": "note", "text": "careful"},
    {"event": "something of a later version"},
    {"event": "step_done"},
]


def test_a_log_file_gets_one_line_per_epoch() -> None:
    stream = io.StringIO()
    progress = Progress(Status(stream))
    for event in EVENTS:
        progress(event)
    assert stream.getvalue().splitlines() == [
        "step 2/2 soft_filter_pruning  epoch 2/4  lr 0.1  loss 0.2500  val 97.12%  2.5 s  ETA 0:05",
        "careful",
        "step 2/2 soft_filter_pruning: done  val 97.12%",
    ]
    assert progress.done == "the end of step 2/2 soft_filter_pruning"


def test_a_terminal_gets_a_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    progress = Progress(Status(stream))
    for event in EVENTS[:3]:
        progress(event)
    shown = stream.getvalue().split("\r")[1:]
    assert "██░░" in shown[1]
    assert "epoch 1/4  loss 0.5000  ETA 1:01" in shown[1]
    assert "\n" not in stream.getvalue()
    progress.close()
    progress.close()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    stream = Terminal()
    progress = Progress(Status(stream))
    for event in EVENTS:
        progress(event)
    assert stream.getvalue() == ""


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3600, 36610)] == ["0:00", "1:00", "1:00:00", "10:10:10"]


def test_a_download_shows_how_far_it_is(
    cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, folder: Path, progress: Callable[[int, int | None], None]) -> None:
        for done in range(0, 170_000_001, 1_000_000):
            progress(done, 170_000_000)

    monkeypatch.setattr("tersenet.data.fetch.fetch", download)
    code, out, err = cli("data", "fetch", "cifar10", "there")
    assert (code, out) == (0, "cifar10 is in there; use it with --data cifar10:there\n")
    assert err.splitlines() == [f"cifar10: {mb} of 170 MB" for mb in range(17, 171, 17)]
