"""Runs a training that is killed again and again, and one that is not; prints both results. Called by test_resume.

Each run is a forked process: torch is imported once only, and everything else is what a restarted command does.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it, which takes a second
from train_support import Recorder, digest, everything, network, train

EPOCHS = 30


def train_into(folder: Path) -> None:
    """Leaves a digest of the final weights beside `folder`, and the processor time after the first and last epoch."""
    model = network()
    times: list[float] = []
    train(
        model,
        everything(epochs=EPOCHS),
        checkpoint=folder / "checkpoint.pt",
        hooks=Recorder(),
        teacher=network(5),
        log=lambda row: times.append(time.process_time()),
    )
    folder.with_suffix(".end").write_text(f"{digest(model)} {times[0]} {times[-1]}")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(seconds: float, folder: Path) -> None:
    """SIGKILL after so much processor time, which does not depend on who else is using the machine."""

    def watch() -> None:
        while time.process_time() < seconds:
            time.sleep(0.001)
        die()

    threading.Thread(target=watch, daemon=True).start()
    train_into(folder)


def die_in_second_save(folder: Path) -> None:
    """SIGKILL when the new checkpoint is written, but not yet in its place."""
    moves = iter([os.replace, lambda old, new: die()])
    os.replace = lambda old, new: next(moves)(old, new)
    train_into(folder)


def exit_code(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path) -> None:
    if exit_code(partial(train_into, folder / "whole")) != 0:
        sys.exit("the uninterrupted run failed")
    wanted, first, last = (folder / "whole.end").read_text().split()
    latest = float(first) + 3 * (float(last) - float(first)) / (EPOCHS - 1)

    moments = random.Random(0)
    killed = folder / "killed"
    checkpoint = killed / "checkpoint.pt"
    kills = kills_with_progress = 0
    for attempt in range(10):
        before = checkpoint.read_bytes() if checkpoint.exists() else b""
        if attempt % 3 == 1:
            code = exit_code(partial(die_in_second_save, killed))
        else:
            code = exit_code(partial(die_after, moments.uniform(0.2, 1.0) * latest, killed))
        kills += code == -signal.SIGKILL
        kills_with_progress += checkpoint.exists() and checkpoint.read_bytes() != before
    if exit_code(partial(train_into, killed)) != 0:
        sys.exit("the killed run could not be finished")
    final = (folder / "killed.end").read_text().split()[0]
    print(f"kills={kills} kills_with_progress={kills_with_progress} final={final} uninterrupted={wanted}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
