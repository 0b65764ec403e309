"""Threads: torch's pool and no other, the same bits for any number, several Python threads at once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_support import ISAS, same
from torch import Tensor

from tersenet.kernels import threads
from tersenet.kernels.layout import layout
from tersenet.kernels.operator import winograd_conv2d
from tersenet.kernels.pack import Packed, pack
from tersenet.lowering.layers import Layer, has_amx
from tersenet.lowering.modules import build


@pytest.fixture(autouse=True)
def thread_number() -> Generator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layers(isa: str | None = None) -> list[tuple[Tensor, Packed]]:
    """One whose blocks share V, and one whose do not."""
    torch.manual_seed(0)
    sizes = [(m, n, c, h, k) for m in (2, 4, 6) for n, c, h, k in ((1, 40, 12, 70), (2, 16, 61, 20))]
    return [(torch.randn(n, c, h, h), pack(torch.randn(k, c, 3, 3), torch.randn(k), m, isa)) for m, n, c, h, k in sizes]


def products() -> list[Callable[[], list[Tensor]]]:
    """Layers on the other dense kernels, with pixels or with outputs shared out."""
    found: list[Callable[[], list[Tensor]]] = []
    one = (1, 1)
    for choice in ("gemm", "amx", "amx half", "F2 amx half") if has_amx() else ("gemm",):
        for c, h, k, stride in ((40, 12, 70, one), (16, 61, 20, one), (200, 7, 90, one), (40, 30, 30, (2, 2))):
            layer = Layer("", torch.randn(k, c, 3, 3), torch.randn(k), stride, one, one, 1, False, "relu")
            if not layer.fits(choice):
                continue
            kernel = build(layer, choice, (1, c, h, h))
            x = torch.randn(1, c, h, h).contiguous(memory_format=torch.channels_last)
            found.append(lambda kernel=kernel, x=x: [kernel(x)])
    return found


def outputs(work: list[tuple[Tensor, Packed]]) -> list[Tensor]:
    return [winograd_conv2d(x, packed, (1, 1), None, "relu") for x, packed in work]


def test_threads_are_not_woken_for_little_work() -> None:
    packed = pack(torch.randn(64, 64, 3, 3))
    used = [layout(packed.algorithm, (1, 64, size, size), (1, 1), 64, 4).threads for size in (4, 12, 56)]
    assert used[0] == 1
    assert 1 < used[1] <= used[2] == 4


@pytest.mark.skipif(threads.runtime() is None, reason="torch's threads can't be used here")
@pytest.mark.parametrize("isa", ISAS)
def test_equal_bits_for_any_number_of_threads(isa: str) -> None:
    work = layers(isa)
    torch.set_num_threads(1)
    alone = outputs(work)
    for number in (2, 5):
        torch.set_num_threads(number)
        assert threads.available() == number
        assert all(map(same, outputs(work), alone))


def test_several_python_threads_at_once() -> None:
    work = layers()
    torch.set_num_threads(1)
    expected = outputs(work)
    torch.set_num_threads(2)
    wrong: list[int] = []

    def call() -> None:
        torch.set_num_threads(2)
        for _ in range(20):
            wrong.extend(i for i, pair in enumerate(zip(outputs(work), expected, strict=True)) if not same(*pair))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_without_a_runtime_one_thread_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    work = layers()
    expected = outputs(work)
    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "runtime", lambda: None)
    assert threads.available() == 1
    assert all(map(same, outputs(work), expected))


def test_pythons_lock_is_free_while_kernels_run() -> None:
    """One thread is in a long call; the other looks at the clock all the while, and is never held up for half of it."""
    x = torch.randn(16, 64, 112, 112).contiguous(memory_format=torch.channels_last)
    packed = pack(torch.randn(64, 64, 3, 3))
    torch.set_num_threads(1)
    winograd_conv2d(x[:1], packed)
    seconds: list[float] = []

    def call() -> None:
        start = time.perf_counter()
        winograd_conv2d(x, packed)
        seconds.append(time.perf_counter() - start)

    caller = threading.Thread(target=call)
    caller.start()
    longest, last = 0.0, time.perf_counter()
    while not seconds:
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    caller.join()
    assert longest < seconds[0] / 2


PROGRAM = """
import os, torch
from tersenet.kernels.layout import layout
from tersenet.kernels.operator import winograd_conv2d
from tersenet.kernels.pack import pack

count = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(2)
x, packed = torch.randn(4, 32, 60, 60), pack(torch.randn(32, 32, 3, 3))
torch.nn.functional.conv2d(x, torch.randn(32, 32, 3, 3))
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
before = count()
winograd_conv2d(x, packed, (1, 1))
print(before, count())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_threads_but_torchs() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, found.stdout.split())
    assert before == after


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_ten_thousand_random_calls_leave_memory_flat() -> None:
    """Two Python threads, random sizes: equal results, and the process does not grow."""
    torch.set_num_threads(2)
    work = [partial(outputs, [pair]) for isa in ISAS for pair in layers(isa)] + products()
    expected = [run() for run in work]
    wrong: list[int] = []

    def call(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(1000):
            i = int(torch.randint(len(work), (), generator=generator))
            if not same(*work[i](), *expected[i]):
                wrong.append(i)

    sizes: list[int] = []
    for round_ in range(5):
        callers = [threading.Thread(target=call, args=(2 * round_ + i,)) for i in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        sizes.append(resident_bytes())
    assert wrong == []
    # The allocator's arenas move by some MB; one output in a hundred left behind would be more.
    assert sizes[-1] - min(sizes[1:]) < 16 * 2**20


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
