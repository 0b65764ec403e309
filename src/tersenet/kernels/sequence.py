"""Several calls of generated code, one behind the other, without going back to Python in between.

Between two layers Python's interpreter finds its own code and data driven out of the cache by weights, so that a call
costs some 50 microseconds there: as much as a small layer.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from tersenet.kernels.blocks import TASK
from tersenet.kernels.context import INDEX
from tersenet.kernels.host import Isa
from tersenet.kernels.ir import Module

SEQUENCE_TASKS = ("run_sequence",)
_COUNTERS = ("next_input", "next_product", "next_slot")
_HEAD, _ROW = 2, 4


@dataclass(frozen=True)
class Sequence:
    """The code that runs a table: the number of rows and the address of OpenMP's function, and then rows of a task's
    address, its context's, its number of threads, and whether the context is at its beginning."""

    isa: Isa

    @property
    def name(self) -> str:
        return f"sequence-{self.isa.name}"


def generate_sequence(algorithm: Sequence) -> str:
    """The text of its module, with the one task `run_sequence`."""
    bits = algorithm.isa.width * 32
    module = Module(algorithm.isa.width, f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"')
    f = module.function("run_sequence", TASK, exported=True)
    count, parallel = f.load("i64", "%context", 8), f.load("ptr", f.offset("%context", 1, "i64"), 8)
    with f.loop(count) as number:
        row = f.offset("%context", f.add(f.mul(number.index, _ROW), _HEAD), "i64")
        task, context = (f.load("ptr", f.offset(row, place, "i64"), 8) for place in (0, 1))
        threads, is_first = (f.load("i64", f.offset(row, place, "i64"), 8) for place in (2, 3))
        with f.when(f.compare("ne", is_first, 0)):
            for name in _COUNTERS:
                f.store("i64", "0", f.offset(context, INDEX[name], "i64"), 8)
        alone = f.compare("sle", threads, 1)
        with f.when(alone):
            f.line(f"call void {task}(ptr {context})")
        with f.when(f.op(f"xor i1 {alone}, true")):
            used = f.op(f"trunc i64 {threads} to i32")
            f.line(f"call void {parallel}(ptr {task}, ptr {context}, i32 {used}, i32 0)")
    return module.text()


def table(rows: list[tuple[int, int, int, bool]], parallel: Any) -> Any:
    """An array for `run_sequence`. Args: rows: address of task and context, threads, whether counters start anew."""
    address = 0 if parallel is None else ctypes.cast(parallel, ctypes.c_void_p).value
    found = [len(rows), address or 0, *(int(value) for row in rows for value in row)]
    return (ctypes.c_int64 * len(found))(*found)
