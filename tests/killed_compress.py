"""Kills `tersenet compress` at random moments until it has been killed often enough, then lets it finish.

Arguments: folder, number of kills, seed. The process imports torch once and forks: each run is a real process, killed
by a real SIGKILL, without seconds of imports in which nothing could go wrong.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from run_support import arguments

# What a run would import on its way.
from tersenet import api  # noqa: F401
from tersenet.cli.main import main
from tersenet.report import html  # noqa: F401


def run(folder: Path, seconds: float | None = None) -> int:
    """The exit code of one run; -9 if it was killed after so many seconds."""
    process = os.fork()
    if process == 0:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            main(arguments(folder))
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_often(folder: Path, kills: int, seed: int) -> None:
    began = time.monotonic()
    assert run(folder / "whole") == 0
    whole = time.monotonic() - began
    moments = random.Random(seed)
    codes: list[int] = []
    while codes.count(-9) < kills and len(codes) < 10 * kills:
        # Mostly early, since what is left becomes less; a run that has finished is killed while it is read again.
        codes.append(run(folder / "killed", moments.uniform(0, whole) * moments.random()))
    codes.append(run(folder / "killed"))
    print(codes)
    assert set(codes) <= {-9, 0}
    assert codes.count(-9) == kills
    assert codes[-1] == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_often(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
