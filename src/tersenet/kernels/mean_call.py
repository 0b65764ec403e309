"""One call of the generated mean over images: sizes, threads."""

from __future__ import annotations

import functools
import struct

import torch

from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import FIELDS, Context
from tersenet.kernels.host import host
from tersenet.kernels.mean import Mean
from tersenet.kernels.winograd import Call

_THREAD_READS = 2**17  # less than about 10 microseconds of work is not worth waking a thread


@functools.lru_cache(maxsize=1024)
def mean_call(x: tuple[int, ...], x_strides: tuple[int, ...], threads: int, half: bool = False) -> Call:
    """For images (N, C, H, W) that are not empty, whose channels lie together in memory, with `half` bfloat16 ones;
    the result is (N, C, 1, 1). Nothing is checked.

    Raises: TersenetError: there are no kernels for this processor, or, with `half`, it has no AMX.
    """
    algorithm = Mean(host().amx(), True) if half else Mean(host().isa())
    images, channels, height, width = x
    fields = {
        "x_image": x_strides[0], "x_row": x_strides[2], "x_column": x_strides[3], "height": height, "width": width,
        "channels": channels, "units": images, "low": struct.unpack("<I", struct.pack("<f", 1 / (height * width)))[0],
    }  # fmt: skip
    count = min(threads, images, max(1, images * channels * height * width // _THREAD_READS))
    context = Context(*(fields.get(name, 0) for name in FIELDS))
    kind = torch.bfloat16 if half else torch.float32
    tasks = tuple(kernels(algorithm).tasks.values())
    return Call((images, channels, 1, 1), bytes(context), tasks, count, 0, 0, dtype=kind)
