"""One call of a generated convolution: memory, addresses, threads."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tersenet.kernels import threads
from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import INDEX, Context
from tersenet.kernels.generate import Algorithm
from tersenet.kernels.layout import layout, output_shape
from tersenet.kernels.memory import zeros
from tersenet.kernels.plan import Plan
from tersenet.kernels.threads import Task

# Bounds of the result, as bits: what an activation cuts off. SiLU is no cut.
_FREE = (-math.inf, math.inf)
BOUNDS = {"none": _FREE, "relu": (0.0, math.inf), "relu6": (0.0, 6.0), "silu": _FREE}
BITS = {name: [struct.unpack("<I", struct.pack("<f", end))[0] for end in ends] for name, ends in BOUNDS.items()}
_STRIDED = [("image", 0), ("row", 2), ("column", 3)]

_X, _Y, _R, _SHARED, _SCRATCH = map(INDEX.__getitem__, "x y r shared scratch".split())
_TABLES = [INDEX[name] for name in ("weight", "bias", "list", "starts")]

_kept = threading.local()


class Tables(NamedTuple):
    """A packed weight, if there is one: of a pruned one `list` and `starts` too."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    list: Tensor | None = None
    starts: Tensor | None = None


def run(
    x: Tensor,
    tables: Tables,
    residual: Tensor | None,
    padding: tuple[int, int],
    out_channels: int,
    algorithm: Algorithm,
    activation: str,
    cut: Plan | None = None,
) -> Tensor:
    """The convolution of `x` with a packed weight, in channels-last memory. Arguments must have been checked."""
    x = _channels_last(x)
    if residual is not None:
        residual = _channels_last(residual)
    strides = None if residual is None else residual.stride()
    found = call(algorithm, x.shape, x.stride(), strides, padding, out_channels, activation, threads.available(), cut)
    return found.run(x, tables, residual)


@dataclass(frozen=True)
class Call:
    """What stays the same from call to call on tensors of the same sizes and strides. `context` lacks addresses.

    `parts`: the scratch memory holds bfloat16 numbers. It is memory of its own then: kernels that calculate with whole
    vectors, of which not all lanes count, would read pairs of them as floats too small to be normal, which takes many
    times longer. `dtype` is the result's.
    """

    shape: tuple[int, int, int, int]
    context: bytes
    tasks: tuple[Task, ...]
    threads: int
    floats: int
    shared_bytes: int
    parts: bool = False
    dtype: torch.dtype = torch.float32

    def run(self, x: Tensor, tables: Tables, residual: Tensor | None, out: Tensor | None = None) -> Tensor:
        """On tensors with the sizes, strides and types that the call was made for: nothing is checked. `out` may be the
        residual, if that is contiguous in channels-last memory."""
        y = out
        if y is None:
            y = torch.empty(self.shape, dtype=self.dtype, device="cpu", memory_format=torch.channels_last)
        if not self.tasks:
            return y
        memory = scratch(self.floats, self.parts)
        context = Context.from_buffer_copy(self.context)
        context[_X], context[_Y] = x.data_ptr(), y.data_ptr()
        for place, table in zip(_TABLES, tables, strict=True):
            if table is not None:
                context[place] = table.data_ptr()
        if residual is not None:
            context[_R] = residual.data_ptr()
        context[_SHARED], context[_SCRATCH] = memory, memory + self.shared_bytes
        address = ctypes.addressof(context)
        # The end of a task is the barrier between them.
        for task in self.tasks:
            task.run(address, self.threads)
        return y


@functools.lru_cache(maxsize=4096)
def call(
    algorithm: Algorithm,
    x: tuple[int, ...],
    x_strides: tuple[int, ...],
    residual_strides: tuple[int, ...] | None,
    padding: tuple[int, int],
    out_channels: int,
    activation: str,
    threads: int,
    cut: Plan | None = None,
) -> Call:
    """For inputs of the shape `x` whose channels lie together in memory."""
    size = (x[0], x[1], x[2], x[3])
    shape = output_shape(size, out_channels, padding)
    if 0 in shape:
        return Call(shape, b"", (), 1, 0, 0)
    laid = layout(algorithm, size, padding, out_channels, threads, cut)
    context = Context.from_buffer_copy(laid.context)
    y_strides = (shape[1] * shape[2] * shape[3], 1, shape[1] * shape[3], shape[1])
    for name, strides in (("x", x_strides), ("y", y_strides), ("r", residual_strides)):
        if strides is not None:
            for axis, dimension in _STRIDED:
                context[INDEX[f"{name}_{axis}"]] = strides[dimension]
    context[INDEX["low"]], context[INDEX["high"]] = BITS[activation]
    context[INDEX["silu"]] = activation == "silu"
    made = kernels(algorithm).tasks
    tasks = tuple(made[name] for name in (("run_input", "run_product") if laid.shared else ("run_private",)))
    floats = laid.shared_floats + laid.threads * laid.thread_floats
    is_parts = algorithm.parts > 0
    return Call(shape, bytes(context), tasks, laid.threads, floats, 4 * laid.shared_floats, is_parts)


def _channels_last(x: Tensor) -> Tensor:
    """`x` as it is if the channels of each pixel lie together, else copied so."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def scratch(floats: int, parts: bool) -> int:
    """Address of scratch memory that this Python thread keeps from call to call; aligned to a cache line."""
    name = "parts" if parts else "floats"
    kept: Tensor | None = getattr(_kept, name, None)
    if kept is None or len(kept) < floats:
        kept = zeros((floats,))
        setattr(_kept, name, kept)
    return kept.data_ptr()
