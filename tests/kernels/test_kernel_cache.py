"""Compiled code on disk: read when it is whole and meant for this code, made again else; never needed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from tersenet.errors import TersenetError
from tersenet.kernels import cache, compiled
from tersenet.kernels.generate import Algorithm
from tersenet.kernels.host import host
from tersenet.kernels.operator import winograd_conv2d
from tersenet.kernels.pack import pack
from tersenet.kernels.winograd import call


class Fresh:
    """As a new process would start: nothing loaded, a cache folder of its own. Counts compilations.

    They are real, but each is done once in this session.
    """

    done: ClassVar[dict[Algorithm, bytes]] = {}

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.file = folder / "kernels" / "winograd-f2-lavin-float-sse.bin"
        self.compilations = 0
        self._patch = patch
        self._compile = compiled._compile  # pyright: ignore[reportPrivateUsage]
        patch.setenv("TERSENET_CACHE", str(folder))
        patch.setattr(compiled, "_compile", self._counted)
        self.algorithm = Algorithm(2, host().isa("sse"))
        torch.manual_seed(0)
        self.x, self.weight = torch.randn(1, 5, 7, 7), torch.randn(6, 5, 3, 3)

    def _counted(self, algorithm: Algorithm) -> bytes:
        self.compilations += 1
        if algorithm not in self.done:
            self.done[algorithm] = self._compile(algorithm)
        return self.done[algorithm]

    def start(self) -> int:
        """How many compilations a process needs that starts now and calls the kernel."""
        self._patch.setattr(compiled, "_loaded", {})
        call.cache_clear()
        before = self.compilations
        y = winograd_conv2d(self.x, pack(self.weight, None, 2, "sse"), (1, 1))
        assert torch.allclose(y, torch.nn.functional.conv2d(self.x, self.weight, padding=1), atol=1e-4)
        return self.compilations - before


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fresh:
    if host().family != "x86":
        pytest.skip("compiles for SSE")
    return Fresh(tmp_path, monkeypatch)


def test_the_second_process_compiles_nothing(fresh: Fresh) -> None:
    assert [fresh.start(), fresh.start()] == [1, 0]
    assert [path.name for path in fresh.file.parent.iterdir()] == [fresh.file.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data + b"0",
        lambda data: os.urandom(len(data)),
    ],
    ids=["empty", "one byte short", "cut in the head", "one bit", "one bit of the head", "longer", "noise"],
)
def test_a_damaged_file_is_made_again(fresh: Fresh, damage: object) -> None:
    assert fresh.start() == 1
    whole = fresh.file.read_bytes()
    fresh.file.write_bytes(damage(whole))  # type: ignore[operator]
    assert fresh.start() == 1
    assert fresh.file.read_bytes() == whole
    assert fresh.start() == 0


@pytest.mark.parametrize(
    ("name", "value"), [("tersenet.kernels.compiled._sources", lambda: "edited"), ("llvmlite.__version__", "0")]
)
def test_code_of_another_version_is_not_taken(
    fresh: Fresh, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fresh.start() == 1
    with monkeypatch.context() as other:
        other.setattr(name, value)
        assert [fresh.start(), fresh.start()] == [1, 0]


def test_the_key_depends_on_algorithm_and_instructions() -> None:
    keys = {compiled.key(Algorithm(m, isa)) for m in (2, 4, 6) for isa in host().isas()}
    assert len(keys) == 3 * len(host().isas())


@pytest.mark.parametrize("kind", ["a file in its place", "a folder in the file's place"])
def test_a_cache_that_can_not_be_written_is_done_without(fresh: Fresh, kind: str) -> None:
    if kind == "a file in its place":
        fresh.file.parent.write_text("mine")
    else:
        fresh.file.mkdir(parents=True)
    assert [fresh.start(), fresh.start()] == [1, 1]


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("TERSENET_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    cache.write("name", b"key", b"data")
    assert cache.read("name", b"key") is None


def test_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.delenv("TERSENET_CACHE", raising=False)
    assert cache.folder() == Path("/elsewhere/tersenet/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache/tersenet/kernels"
    monkeypatch.setenv("TERSENET_CACHE", "/mine")
    assert cache.folder() == Path("/mine/kernels")


def test_two_threads_compile_once(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_loaded", {})
    found: list[compiled.Kernels] = []
    callers = [threading.Thread(target=lambda: found.append(compiled.kernels(fresh.algorithm))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert fresh.compilations == 1
    assert all(one is found[0] for one in found)


def test_what_llvm_refuses_is_one_error(fresh: Fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "done", {})
    monkeypatch.setattr(compiled, "generate", lambda algorithm: "not IR")
    monkeypatch.setattr(compiled, "_loaded", {})
    with pytest.raises(TersenetError, match=r"LLVM can't make winograd-f2-lavin-float-sse for this machine: .*parsing"):
        compiled.kernels(fresh.algorithm)


@pytest.mark.slow
def test_processes_that_start_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each writes the file; all of them compute, and what is left is whole."""
    monkeypatch.setenv("TERSENET_CACHE", str(tmp_path))
    program = (
        "import torch; from tersenet.kernels.pack import pack; from tersenet.kernels.operator import winograd_conv2d;"
        "print(float(winograd_conv2d(torch.ones(1, 1, 3, 3), pack(torch.ones(1, 1, 3, 3), None, 2))))"
    )
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in started] == ["9.0\n"] * 2
    algorithm = Algorithm(2, host().isa())
    assert cache.read(algorithm.name, compiled.key(algorithm)) is not None
    assert len(list((tmp_path / "kernels").iterdir())) == 1
