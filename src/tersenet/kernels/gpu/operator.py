"""The Triton kernels as the implementation for CUDA tensors of torch's operators `tersenet::winograd_conv2d` and
`tersenet::sparse_winograd_conv2d`, and as a checked function.

In the place of a CPU's instructions the operators are told one of `PRECISIONS`. Importing this registers them; Triton
itself is loaded by the first call.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.kernels import operator, sparse_operator
from tersenet.kernels.generate import POINTS
from tersenet.kernels.gpu.host import interpreted, problem
from tersenet.kernels.gpu.pack import WIDTH, GpuAlgorithm, GpuPacked, padded_channels
from tersenet.kernels.gpu.run import Tables, run
from tersenet.kernels.operator import check_call

# The operators are defined where their CPU implementations are.
DEFINED_IN = (operator, sparse_operator)


def gpu_winograd_conv2d(
    x: Tensor,
    packed: GpuPacked,
    padding: tuple[int, int] = (0, 0),
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(conv2d(x, weight, bias, padding=padding) + residual) by F(m x m, 3 x 3) on a GPU.

    With a weight that `pack_gpu_domain` packed it is what that stands for, with its ReLU behind the input transform.

    Args:
        x: (N, C_in, H, W) on a CUDA device, of the type that the weight was packed for. Channels-last memory is taken
            as it is, other is copied. In Triton's interpreter (TRITON_INTERPRET=1) on the CPU.
        packed: What `pack_gpu` or `pack_gpu_domain` made of weight and bias, on the same device.
        padding: Zeros above and below, left and right.
        residual: (N, C_out, H', W') of the same type, or None.
        activation: "none", "relu", "relu6" or "silu".

    Returns:
        (N, C_out, H', W') in channels-last memory.

    Raises:
        TersenetError: another type, device or shape; a gradient is asked for; Triton kernels don't run here.
    """
    if x.device != packed.weight.device or x.layout != torch.strided:
        raise TersenetError(f"x (={x.layout} on {x.device}) must be a dense tensor on {packed.weight.device}")
    if x.ndim == 4 and x.shape[1] != packed.in_channels:
        raise TersenetError(f"x (={tuple(x.shape)}) must have the {packed.in_channels} channels of the packed weight")
    if x.device.type == "cpu" and not interpreted():
        raise TersenetError(f"no Triton kernels: {problem() or 'x is on the CPU, and they take CUDA tensors'}")
    of_call = (packed.bias, residual, padding, packed.out_channels, packed.algorithm.m)
    a = packed.algorithm
    if packed.list is not None and packed.starts is not None:
        found = (x, packed.weight, packed.list, packed.starts, *of_call, a.points, a.relu, a.isa, activation)
        return (sparse_on_gpu if interpreted() else torch.ops.tersenet.sparse_winograd_conv2d)(*found)
    found = (x, packed.weight, *of_call, a.isa, activation, a.points, a.relu)
    return (dense_on_gpu if interpreted() else torch.ops.tersenet.winograd_conv2d)(*found)


def dense_on_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    padding: tuple[int, int],
    out_channels: int,
    m: int,
    isa: str,
    activation: str,
    points: str = POINTS,
    relu: bool = False,
    threshold: float = 0.0,
) -> Tensor:
    """`torch.ops.tersenet.winograd_conv2d` for CUDA tensors. Raises: TersenetError for what does not fit together."""
    algorithm = _algorithm(m, weight.dtype, isa, points, relu, threshold)
    pads = (padding[0], padding[1])
    check_call(x, residual, pads, out_channels, activation, weight.dtype)
    wide, high = padded_channels(x.shape[1], out_channels)
    _check(x, residual, {
        "weight": (weight, (algorithm.t**2, wide, high), weight.dtype), "bias": (bias, (2, high), torch.float32),
    })  # fmt: skip
    return run(x, Tables(weight, bias), residual, pads, out_channels, algorithm, activation)


def sparse_on_gpu(
    x: Tensor,
    weight: Tensor,
    list: Tensor,
    starts: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    padding: tuple[int, int],
    out_channels: int,
    m: int,
    points: str,
    relu: bool,
    isa: str,
    activation: str,
    threshold: float = 0.0,
) -> Tensor:
    """`torch.ops.tersenet.sparse_winograd_conv2d` for CUDA tensors. The numbers in `list` and `starts` are not looked
    at: wrong ones give a wrong result, but the kernels read nothing outside of their tensors.

    Raises: TersenetError for what does not fit together.
    """
    algorithm = _algorithm(m, weight.dtype, isa, points, relu, threshold)
    pads = (padding[0], padding[1])
    check_call(x, residual, pads, out_channels, activation, weight.dtype)
    _, high = padded_channels(x.shape[1], out_channels)
    rows = algorithm.t**2 * (high // WIDTH)
    _check(x, residual, {
        "weight": (weight, (len(list), WIDTH), weight.dtype), "list": (list, (len(list),), torch.int32),
        "starts": (starts, (rows + 1,), torch.int64), "bias": (bias, (2, high), torch.float32),
    })  # fmt: skip
    return run(x, Tables(weight, bias, list, starts), residual, pads, out_channels, algorithm, activation)


_library = torch.library.Library("tersenet", "FRAGMENT")
_library.impl("winograd_conv2d", dense_on_gpu, "CUDA")
_library.impl("sparse_winograd_conv2d", sparse_on_gpu, "CUDA")


@functools.lru_cache(maxsize=256)
def _algorithm(m: int, dtype: torch.dtype, isa: str, points: str, relu: bool, threshold: float) -> GpuAlgorithm:
    if threshold:
        raise TersenetError(f"the kernels for a GPU have no threshold (={threshold:g}) behind the input transform")
    return GpuAlgorithm(m, dtype, isa, points, relu)


def _check(x: Tensor, residual: Tensor | None, packed: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]]) -> None:
    """Everything that the kernels rely on: they check nothing themselves."""
    for name, (tensor, shape, kind) in packed.items():
        if tensor.shape != shape or tensor.dtype != kind or not tensor.is_contiguous() or tensor.device != x.device:
            raise TersenetError(
                f"packed {name} (={tensor.dtype} {tuple(tensor.shape)} on {tensor.device}) must be contiguous, {kind}, "
                f"on {x.device} and of shape {shape} for {x.shape[1]} input channels: pack it for GPUs again"
            )
    if residual is not None and residual.device != x.device:
        raise TersenetError(f"residual is on {residual.device} and x on {x.device}: move one to the other")
