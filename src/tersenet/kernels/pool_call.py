"""One call of the generated max pooling: sizes, threads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import FIELDS, Context
from tersenet.kernels.host import host
from tersenet.kernels.pool import Pool
from tersenet.kernels.winograd import Call, Tables

NO_TABLES = Tables()
_THREAD_READS = 2**17  # less than about 10 microseconds of work is not worth waking a thread

Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """Those of max pooling, along both axes; `ceil`: the last one may hang over the image."""

    size: Pair
    step: Pair
    padding: Pair
    ceil: bool = False

    def count(self, length: int, axis: int) -> int:
        """Windows on `length` pixels, as torch counts them: each begins in the image or in the padding before it."""
        size, step, padding = self.size[axis], self.step[axis], self.padding[axis]
        over = length + 2 * padding - size
        if not self.ceil:
            return over // step + 1
        count = -(-over // step) + 1
        return count - 1 if (count - 1) * step >= length + padding else count


@functools.lru_cache(maxsize=1024)
def pool_call(
    x: tuple[int, ...],
    x_strides: tuple[int, ...],
    windows: Windows,
    threads: int,
    isa: str | None = None,
    half: bool = False,
) -> Call:
    """For inputs (N, C, H, W) whose channels lie together in memory, with `half` bfloat16 ones. Nothing is checked.

    Raises: TersenetError: there are no kernels for this processor, or it can't run `isa`, or, with `half`, has no AMX.
    """
    algorithm = Pool(host().amx(), True) if half else Pool(host().isa(isa))
    images, channels, height, width = x
    shape = (images, channels, windows.count(height, 0), windows.count(width, 1))
    rows, kind = images * shape[2], torch.bfloat16 if half else torch.float32
    if 0 in shape:
        return Call(shape, b"", (), 1, 0, 0, dtype=kind)
    fields = {
        "x_image": x_strides[0], "x_row": x_strides[2], "x_column": x_strides[3], "height": height, "width": width,
        "y_image": shape[2] * shape[3] * channels, "y_row": shape[3] * channels, "y_column": channels,
        "channels": channels, "out_height": shape[2], "out_width": shape[3], "units": rows,
        "pad_top": windows.padding[0], "pad_left": windows.padding[1], "size_high": windows.size[0],
        "size_wide": windows.size[1], "step_high": windows.step[0], "step_wide": windows.step[1],
    }  # fmt: skip
    reads = rows * shape[3] * channels * windows.size[0] * windows.size[1]
    count = min(threads, rows, max(1, reads // _THREAD_READS))
    context = Context(*(fields.get(name, 0) for name in FIELDS))
    return Call(shape, bytes(context), tuple(kernels(algorithm).tasks.values()), count, 0, 0, dtype=kind)
