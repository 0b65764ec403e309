"""Whole runs in real processes: killed, interrupted, in parallel, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tersenet as tn
from run_support import SETTINGS, arguments, files, same, start
from tersenet.errors import TersenetError
from tersenet.exporting import artifact

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)], ids=["once", "ten times"])
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path, kills: int) -> None:
    process = start(str(FOLDER / "killed_compress.py"), str(tmp_path), str(kills), str(kills))
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err[-3000:]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert same(tn.load(killed / "model"), tn.load(whole / "model"))
    assert files(killed / "model") == files(whole / "model")
    # Nothing half-written, nothing of the killed processes.
    assert files(killed).keys() == files(whole).keys()


@pytest.mark.slow
def test_killed_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As `python -m tersenet compress` is killed by a system that runs out of memory: imports included."""
    folder = tmp_path / "run"
    whole = start("-m", "tersenet", *arguments(tmp_path / "whole"))
    began = time.monotonic()
    assert whole.wait(timeout=200) == 0
    seconds = time.monotonic() - began
    for share in (0.2, 0.4, 0.5, 0.6, 0.7, 0.8):
        process = start("-m", "tersenet", *arguments(folder))
        time.sleep(share * seconds)
        process.kill()
        process.communicate()
    last = start("-m", "tersenet", *arguments(folder))
    assert last.wait(timeout=200) == 0
    assert files(folder / "model") == files(tmp_path / "whole" / "model")


def test_an_interrupt_is_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Ctrl-C while it imports, and in the middle of training."""
    folder = tmp_path / "run"
    command = ("-m", "tersenet", *arguments(folder), "--set", "steps.0.fit.epochs=150")
    for marker in (None, folder / "steps" / "00-train" / "checkpoint.pt"):
        process = start(*command)
        for _ in range(1200):
            if marker is None or marker.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        time.sleep(1.0 if marker is None else 0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        # To a shell both are 130; Python ends itself by the signal if that came while a string was executed.
        assert process.returncode in (130, -signal.SIGINT), err
        assert out == ""
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("interrupted")
    assert "the same command goes on from " in err
    last = start(*command)
    _, err = last.communicate(timeout=120)
    assert last.returncode == 0, err
    assert "epoch 1/150" not in err.partition("step 2/2")[0]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def parallel(folder: Path) -> tuple[int, str, str]:
    """`tersenet compress` under torchrun with two processes."""
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    process = start(*ranks, "--master-port", str(free_port()), "-m", "tersenet", *arguments(folder), "--json")
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, out, err = parallel(folder)
    assert code == 0, err[-3000:]
    report = json.loads(out)
    alone = tn.evaluate(str(folder), "digits", device="cpu")
    together = report["after"]["accuracy"]
    assert (together["n"], together["correct"]) == (alone.n, alone.correct)
    assert report["after"]["macs"] <= 0.6 * report["before"]["macs"]
    # Masks that differed between ranks would have made networks of other shapes, and no common result.
    assert [step["equality"] is not None for step in report["steps"]] == [False, True]
    assert not [name for name in files(folder) if name.endswith((".tmp", ".new", "checkpoint.pt"))]


@pytest.mark.slow
def test_two_processes_refuse_together(tmp_path: Path) -> None:
    """The first rank sees what is wrong with the folder; the second must not wait for it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    began = time.monotonic()
    code, _, err = parallel(tmp_path / "run")
    assert code != 0
    assert "is not empty and holds no run" in err
    assert time.monotonic() - began < 100


def compress(folder: Path) -> tn.Result:
    torch.set_num_threads(1)
    return tn.compress(None, SETTINGS, out=folder, device="cpu")


def test_a_full_disk_at_any_write_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th file can't be written, for growing n: one message, and what was there before still loads."""
    expected = compress(tmp_path / "whole")
    folder, replace = tmp_path / "run", os.replace
    for stop in range(12):
        left = 1 + stop % 4

        def full(source: Any, target: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full)
            with pytest.raises(TersenetError, match=r"^could not write [^\n]*: No space left on device[^\n]*$"):
                compress(folder)
        assert not list(folder.rglob(".*.tmp"))
        for saved in folder.rglob("model.json"):
            artifact.load(saved.parent)
    assert same(compress(folder).model, expected.model)
    assert files(folder / "model") == files(tmp_path / "whole" / "model")
