"""The convolution as an operator of torch, `torch.ops.tersenet.winograd_conv2d`, and as a checked function.

The operator has a fake kernel, so that modules that call it go through torch.compile and torch.export. Its weight is a
packed one, which only fits the vector instructions that it was packed for.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tersenet.errors import TersenetError, UnknownNameError
from tersenet.kernels.generate import POINTS, Algorithm, R
from tersenet.kernels.host import host
from tersenet.kernels.layout import output_shape
from tersenet.kernels.pack import WEIGHT_TYPES, Packed, packed_shape
from tersenet.kernels.winograd import BOUNDS, Tables, run

_library = torch.library.Library("tersenet", "FRAGMENT")
_library.define(
    "winograd_conv2d(Tensor x, Tensor weight, Tensor bias, Tensor? residual, SymInt[2] padding, int out_channels, "
    "int m, str isa, str activation, str points='lavin', bool relu=False, float threshold=0.0) -> Tensor"
)


def winograd_conv2d(
    x: Tensor,
    packed: Packed,
    padding: tuple[int, int] = (0, 0),
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(conv2d(x, weight, bias, padding=padding) + residual) by F(m x m, 3 x 3), in one pass over memory.

    With a weight that `pack_domain` packed it is what that stands for, with its ReLU behind the input transform.

    Args:
        x: (N, C_in, H, W), float32, on the CPU. Channels-last memory is taken as it is, other is copied.
        packed: What `pack` or `pack_domain` made of weight and bias.
        padding: Zeros above and below, left and right.
        residual: (N, C_out, H', W'), float32, or None.
        activation: "none", "relu", "relu6" or "silu".

    Returns:
        (N, C_out, H', W') in channels-last memory; the same bits for any number of threads.

    Raises:
        TersenetError: another type, device or shape; a gradient is asked for.
    """
    if x.device.type not in ("cpu", "meta") or x.layout != torch.strided:
        raise TersenetError(f"x (={x.layout} on {x.device}) must be a dense tensor on the CPU")
    if x.ndim == 4 and x.shape[1] != packed.in_channels:
        # The packed weight is padded: it does not tell by its shape.
        raise TersenetError(f"x (={tuple(x.shape)}) must have the {packed.in_channels} channels of the packed weight")
    algorithm = packed.algorithm
    return torch.ops.tersenet.winograd_conv2d(
        x, packed.weight, packed.bias, residual, padding, packed.out_channels,
        algorithm.m, algorithm.isa.name, activation, algorithm.points, algorithm.relu, algorithm.threshold,
    )  # fmt: skip


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    padding: list[int],
    out_channels: int,
    m: int,
    isa: str,
    activation: str,
    points: str = POINTS,
    relu: bool = False,
    threshold: float = 0.0,
) -> Tensor:
    algorithm = _algorithm(m, isa, weight.dtype, weight.shape[-1:], points, relu, threshold)
    pads = (padding[0], padding[1])
    _check(x, weight, bias, residual, pads, out_channels, algorithm, activation)
    return run(x, Tables(weight, bias), residual, pads, out_channels, algorithm, activation)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    padding: list[int],
    out_channels: int,
    *rest: Any,
) -> Tensor:
    return fake_output(x, padding, out_channels)


def fake_output(x: Tensor, padding: list[int], out_channels: int) -> Tensor:
    """A tensor without values, of the result's shape. Sizes may be symbols."""
    shape = (x.shape[0], out_channels, x.shape[2] + 2 * padding[0] - R + 1, x.shape[3] + 2 * padding[1] - R + 1)
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def no_backward(context: Any, gradient: Tensor) -> Any:
    raise TersenetError(
        "the generated kernels have no backward; train the network before it is lowered, "
        "or run it under torch.inference_mode()"
    )


_library.impl("winograd_conv2d", _cpu, "CPU")
torch.library.register_fake("tersenet::winograd_conv2d", _fake, lib=_library)
torch.library.register_autograd("tersenet::winograd_conv2d", no_backward, lib=_library)


@functools.lru_cache(maxsize=256)
def _algorithm(
    m: int, isa: str, weight: torch.dtype, channels: tuple[int, ...], points: str, relu: bool, threshold: float
) -> Algorithm:
    """`channels`: the last size of a packed weight, which tells one bfloat16 part from two."""
    own = host().isa(isa)
    kept = {kind: name for name, kind in WEIGHT_TYPES.items()}.get(weight, "float")
    if weight == torch.bfloat16 and channels == (2 * own.channels,):
        kept = "parts"
    return Algorithm(m, own, kept, points, relu, threshold)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    padding: tuple[int, int],
    out_channels: int,
    algorithm: Algorithm,
    activation: str,
) -> None:
    """Everything that generated code relies on: it checks nothing itself."""
    check_call(x, residual, padding, out_channels, activation)
    expected = packed_shape(algorithm, out_channels, x.shape[1])
    flat = (2, expected[0] * algorithm.isa.channels)
    kept = WEIGHT_TYPES[algorithm.weight]
    for name, tensor, shape, kind in (("weight", weight, expected, kept), ("bias", bias, flat, torch.float32)):
        if tensor.shape != shape or tensor.dtype != kind or not tensor.is_contiguous():
            raise TersenetError(
                f"packed {name} (={tensor.dtype} {tuple(tensor.shape)}) must be contiguous, {kind} and of shape "
                f"{shape} for {x.shape[1]} input and {out_channels} output channels on {algorithm.isa.name}: "
                "pack it again"
            )


def check_call(
    x: Tensor,
    residual: Tensor | None,
    padding: tuple[int, int],
    out_channels: int,
    activation: str,
    kind: torch.dtype = torch.float32,
) -> None:
    """Raises: TersenetError for tensors that are not of `kind` or don't fit together, or an unknown activation."""
    name = str(kind).removeprefix("torch.")
    if x.ndim != 4 or x.dtype != kind:
        raise TersenetError(f"x (={x.dtype} {tuple(x.shape)}) must be {name} and of shape (N, C_in, H, W)")
    if activation not in BOUNDS:
        raise UnknownNameError("activation", activation, BOUNDS)
    shape = output_shape((x.shape[0], x.shape[1], x.shape[2], x.shape[3]), out_channels, padding)
    if min(padding) < 0 or min(shape[2:]) < 1:
        raise TersenetError(f"x (={tuple(x.shape)}) with padding {padding} has no room for a 3x3 kernel")
    if residual is not None and (residual.shape != shape or residual.dtype != kind):
        raise TersenetError(f"residual (={residual.dtype} {tuple(residual.shape)}) must be {name} and of shape {shape}")
