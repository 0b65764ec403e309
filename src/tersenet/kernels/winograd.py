"""One call of a generated convolution: memory, addresses, threads."""

from __future__ import annotations

import ctypes
import math
import struct
import threading

import torch
from torch import Tensor

from tersenet.kernels import threads
from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import INDEX, Context
from tersenet.kernels.generate import Algorithm
from tersenet.kernels.layout import layout, output_shape
from tersenet.kernels.plan import Plan

# Bounds of the result, as bits: what an activation cuts off. SiLU is no cut.
_FREE = (-math.inf, math.inf)
BOUNDS = {"none": _FREE, "relu": (0.0, math.inf), "relu6": (0.0, 6.0), "silu": _FREE}
_BITS = {name: [struct.unpack("<I", struct.pack("<f", end))[0] for end in ends] for name, ends in BOUNDS.items()}
_STRIDED = [("image", 0), ("row", 2), ("column", 3)]

_scratch = threading.local()


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    padding: tuple[int, int],
    out_channels: int,
    algorithm: Algorithm,
    activation: str,
    cut: Plan | None = None,
) -> Tensor:
    """The convolution of `x` with a packed weight, in channels-last memory. Arguments must have been checked."""
    shape = output_shape((x.shape[0], x.shape[1], x.shape[2], x.shape[3]), out_channels, padding)
    y = torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    if not y.numel():
        return y
    x = _channels_last(x)
    if residual is not None:
        residual = _channels_last(residual)
    laid = layout(algorithm, tuple(x.shape), padding, out_channels, threads.available(), cut)
    memory = _memory(laid.shared_floats + laid.threads * laid.thread_floats)
    context = Context.from_buffer_copy(laid.context)
    for name, tensor in (("x", x), ("y", y), ("r", residual)):
        if tensor is not None:
            context[INDEX[name]] = tensor.data_ptr()
            for axis, dimension in _STRIDED:
                context[INDEX[f"{name}_{axis}"]] = tensor.stride(dimension)
    context[INDEX["weight"]], context[INDEX["bias"]] = weight.data_ptr(), bias.data_ptr()
    context[INDEX["shared"]], context[INDEX["scratch"]] = memory, memory + 4 * laid.shared_floats
    context[INDEX["low"]], context[INDEX["high"]] = _BITS[activation]
    context[INDEX["silu"]] = activation == "silu"
    address = ctypes.addressof(context)
    tasks = kernels(algorithm).tasks
    # The end of a task is the barrier between them.
    for name in ("run_input", "run_product") if laid.shared else ("run_private",):
        tasks[name].run(address, laid.threads)
    return y


def _channels_last(x: Tensor) -> Tensor:
    """`x` as it is if the channels of each pixel lie together, else copied so."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)


def _memory(floats: int) -> int:
    """Address of scratch memory that this Python thread keeps from call to call; aligned to a cache line."""
    kept: Tensor | None = getattr(_scratch, "kept", None)
    if kept is None or kept.numel() < floats:
        kept = _scratch.kept = torch.empty(floats, dtype=torch.float32, device="cpu")
    return kept.data_ptr()
