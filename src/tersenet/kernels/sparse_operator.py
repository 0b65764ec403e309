"""The convolution by a pruned weight of the Winograd domain as an operator of torch, and as a checked function."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.kernels.generate import Algorithm
from tersenet.kernels.host import host
from tersenet.kernels.operator import check_call, fake_output, no_backward
from tersenet.kernels.pack_sparse import SparsePacked
from tersenet.kernels.scattered import SLICE
from tersenet.kernels.winograd import Tables, run

_library = torch.library.Library("tersenet", "FRAGMENT")
_library.define(
    "sparse_winograd_conv2d(Tensor x, Tensor weight, Tensor list, Tensor starts, Tensor bias, Tensor? residual, "
    "SymInt[2] padding, int out_channels, int m, str points, bool relu, str isa, str activation, "
    "float threshold=0.0) -> Tensor"
)


def sparse_winograd_conv2d(
    x: Tensor,
    packed: SparsePacked,
    padding: tuple[int, int] = (0, 0),
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(A^T [sum over C_in of W * V] A + bias + residual) with V = B^T d B, or its ReLU, for every tile d.

    Args:
        x: (N, C_in, H, W), float32, on the CPU. Channels-last memory is taken as it is, other is copied.
        packed: What `pack_sparse` made of weight and bias.
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
        raise TersenetError(f"x (={tuple(x.shape)}) must have the {packed.in_channels} channels of the packed weight")
    algorithm = packed.algorithm
    return torch.ops.tersenet.sparse_winograd_conv2d(
        x, packed.weight, packed.list, packed.starts, packed.bias, residual, padding, packed.out_channels,
        algorithm.m, algorithm.points, algorithm.relu, algorithm.isa.name, activation, algorithm.threshold,
    )  # fmt: skip


def _cpu(
    x: Tensor,
    weight: Tensor,
    list: Tensor,
    starts: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    padding: list[int],
    out_channels: int,
    m: int,
    points: str,
    relu: bool,
    isa: str,
    activation: str,
    threshold: float = 0.0,
) -> Tensor:
    algorithm = _algorithm(m, isa, "scattered" if weight.ndim == 1 else "sparse", points, relu, threshold)
    pads = (padding[0], padding[1])
    check_call(x, residual, pads, out_channels, activation)
    _check_tables(weight, list, starts, bias, x.shape[1], out_channels, algorithm)
    return run(x, Tables(weight, bias, list, starts), residual, pads, out_channels, algorithm, activation)


def _fake(
    x: Tensor,
    weight: Tensor,
    list: Tensor,
    starts: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    padding: list[int],
    out_channels: int,
    *rest: Any,
) -> Tensor:
    return fake_output(x, padding, out_channels)


_library.impl("sparse_winograd_conv2d", _cpu, "CPU")
torch.library.register_fake("tersenet::sparse_winograd_conv2d", _fake, lib=_library)
torch.library.register_autograd("tersenet::sparse_winograd_conv2d", no_backward, lib=_library)


@functools.lru_cache(maxsize=256)
def _algorithm(m: int, isa: str, weight: str, points: str, relu: bool, threshold: float) -> Algorithm:
    return Algorithm(m, host().isa(isa), weight, points, relu, threshold)


def _check_tables(
    weight: Tensor, entries: Tensor, starts: Tensor, bias: Tensor, channels: int, outputs: int, algorithm: Algorithm
) -> None:
    """Everything that generated code relies on: a wrong number would be a wrong address."""
    isa = algorithm.isa
    single = algorithm.weight == "scattered"
    rows = -(-channels // SLICE) * outputs if single else -(-outputs // isa.width)
    step = isa.width if single else 1
    wanted = (
        ("weight", weight, (len(entries),) if single else (len(entries), isa.width), torch.float32),
        ("list", entries, (len(entries),), torch.int32),
        ("starts", starts, (rows * algorithm.t**2 + 1,), torch.int64),
        ("bias", bias, (2, -(-outputs // isa.channels) * isa.channels), torch.float32),
    )
    for name, tensor, shape, kind in wanted:
        if tensor.shape != shape or tensor.dtype != kind or not tensor.is_contiguous():
            raise TersenetError(
                f"packed {name} (={tensor.dtype} {tuple(tensor.shape)}) must be contiguous, {kind} and of shape "
                f"{shape} for {outputs} output channels on {isa.name}: pack it again"
            )
    ordered = int(starts[0]) == 0 and int(starts[-1]) == len(entries) and bool((starts.diff() >= 0).all())
    inside = not len(entries) or 0 <= int(entries.min()) <= int(entries.max()) <= (channels - 1) * step
    if not (ordered and inside and bool((entries % step == 0).all())):
        raise TersenetError(f"the packed lists don't fit {channels} input channels: pack the weight again")
