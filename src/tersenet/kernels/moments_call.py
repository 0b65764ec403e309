"""Second moments on AMX's tiles: memory, threads, and whether this processor can."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from contextlib import suppress
from dataclasses import replace

import torch

from tersenet.errors import TersenetError
from tersenet.kernels import memory
from tersenet.kernels.compiled import Kernels, kernels
from tersenet.kernels.host import host
from tersenet.kernels.moments import GROUP, SEGMENT, MomentKernel
from tersenet.kernels.moments_split import DIGITS, FIELDS, PANEL, STEP
from tersenet.kernels.threads import available

ROWS = 1024  # rows of a block: its digits of four panels fill a fifth of the second-level cache

# What the kernels know of each column: the unit of its digits' products, how far the block's mean is from what is taken
# off the rows and from the mean so far, both times the root of a number of rows, and the mean.
_OF_COLUMNS = ("units", "offsets", "distances", "means")
_Context = ctypes.c_int64 * len(FIELDS)


@functools.cache
def usable() -> bool:
    """Whether this machine can: it has AMX with tiles of bytes, and LLVM makes code for it."""
    try:
        _kernels()
    except TersenetError:
        return False
    return True


def _kernels() -> Kernels:
    amx = host().amx()
    if "amx-int8" not in host().features:
        raise TersenetError(f"this processor ({host().cpu}) has no tiles of bytes")
    return kernels(MomentKernel(replace(amx, name="amx-int8", extra=f"{amx.extra},+amx-int8")))


class _Scratch:
    """What is written anew for each block of rows: the rows, and their digits for both sides of the products."""

    def __init__(self, width: int) -> None:
        # An odd number of lines between rows: with even ones columns would meet in few sets of the cache.
        self.rows = memory.zeros((ROWS, width + PANEL // 2))
        self.left, self.right = (memory.zeros((width, DIGITS, ROWS), torch.int8) for _ in range(2))


_spare: list[_Scratch] = []
"""Of the layer before, at most one: the system has to zero memory that is new to the process."""


def _taken(width: int) -> _Scratch | None:
    with suppress(IndexError):
        scratch = _spare.pop()
        return scratch if len(scratch.left) == width else None


class TileMoments:
    """Sums over rows of `columns` float32 values, as they come block by block.

    `rows` (ROWS, columns) is filled by the caller. `means` (columns,) and `sums` (columns, columns) are float64; of
    `sums`, what lies on and below the diagonal is added to.
    """

    def __init__(self, columns: int) -> None:
        panels = -(-columns // PANEL)
        width = panels * PANEL
        self._scratch = _taken(width) or _Scratch(width)
        self._sums = memory.zeros((width, width), torch.float64)
        self._columns = memory.zeros((len(_OF_COLUMNS), width), torch.float64)
        self._panels = panels
        self.rows, self.means = self._scratch.rows[:, :columns], self._columns[-1, :columns]
        self.sums = self._sums[:columns, :columns]

    def __del__(self) -> None:
        _spare[:] = [self._scratch]

    def add(self, new: int, old: int) -> None:
        """Take in the first `new` of the rows; `old` ones are in the sums."""
        scratch = self._scratch
        values = {
            "rows": scratch.rows.data_ptr(), "stride": scratch.rows.stride(0), "left": scratch.left.data_ptr(),
            "right": scratch.right.data_ptr(), "sums": self._sums.data_ptr(), "width": self._sums.stride(0),
            "panels": self._panels, "steps": -(-new // STEP), "count": new, "reciprocal": _bits(1 / new),
            "share": _bits(new / (old + new)), "weight": _bits(math.sqrt(old * new / (old + new))),
            "root": _bits(math.sqrt(new)), "next": 0,
        }  # fmt: skip
        values |= {name: row.data_ptr() for name, row in zip(_OF_COLUMNS, self._columns, strict=True)}
        tasks = _kernels().tasks
        units = -(-self._panels // GROUP) * -(-self._panels // SEGMENT)
        for name, count in (("run_split", self._panels), ("run_products", units)):
            context = _Context(*(values[field] for field in FIELDS))
            tasks[name].run(ctypes.addressof(context), min(available(), count))


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]
