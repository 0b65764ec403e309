"""Weights in the form that the Triton kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tersenet.errors import TersenetError, UnknownNameError
from tersenet.kernels.generate import OUTPUTS, POINTS, R
from tersenet.kernels.pack_sparse import in_blocks
from tersenet.ops.cook_toom import Transforms, cook_toom

WIDTH = 16
"""Output channels of a block of a pruned weight: the fewest that tensor cores multiply."""
STEP = 32
"""C_in is padded to a multiple of it, C_out to one of `WIDTH`."""
PRECISIONS = {"triton": "ieee", "triton-tf32x3": "tf32x3", "triton-tf32": "tf32"}
"""What takes the place of a CPU's instructions in the operators -> how Triton multiplies float32 numbers."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The largest weight of an output channel is below 2^14; the smallest normal one is 2^-14.
_HALF_EXPONENT = 14


@dataclass(frozen=True)
class GpuAlgorithm:
    """F(m x m, 3 x 3) with V and the weight in `dtype`, and sums in float32.

    `isa`: "triton" multiplies float32 numbers as they are; "triton-tf32x3" on tensor cores as three products of their
    parts, about as exact; "triton-tf32" as one, with 11 significant bits. It means nothing for 16-bit types. `relu`: a
    ReLU between the input transform and the product.
    """

    m: int
    dtype: torch.dtype = torch.float32
    isa: str = "triton"
    points: str = POINTS
    relu: bool = False

    def __post_init__(self) -> None:
        if self.m not in OUTPUTS:
            raise TersenetError(f"m (={self.m}) of F(m x m, 3 x 3) must be one of {', '.join(map(str, OUTPUTS))}")
        if self.dtype not in DTYPES:
            raise TersenetError(f"dtype (={self.dtype}) must be one of {', '.join(map(str, DTYPES))}")
        if self.isa not in PRECISIONS:
            raise UnknownNameError("kind of Triton kernel", self.isa, PRECISIONS)

    @property
    def t(self) -> int:
        return self.m + R - 1

    @property
    def transforms(self) -> Transforms:
        return cook_toom(self.m, R, self.points)

    @property
    def scale(self) -> float:
        """What V is multiplied by: in float16 a power of two that keeps the transform of finite inputs finite."""
        if self.dtype != torch.float16:
            return 1.0
        return 2.0 ** -(int(np.ceil(np.log2(float(self.transforms.growth()["input"])))))


@dataclass(frozen=True)
class GpuPacked:
    """A transformed weight and its bias on one device.

    `weight` (t t, C_in padded, C_out padded), and `bias` (2, C_out padded), each channel's bias and the factor that its
    sums need. Of a pruned one: `weight` (entries, WIDTH), one input channel's weights for one block of outputs, `list`
    (entries,) int32 that channel, `starts` (t t blocks + 1,) int64 the first entry of each tap and block.
    """

    algorithm: GpuAlgorithm
    weight: Tensor
    bias: Tensor
    in_channels: int
    out_channels: int
    list: Tensor | None = None
    starts: Tensor | None = None

    @property
    def density(self) -> float:
        """Share that is left of the weights, in blocks of one input channel by WIDTH outputs, in all taps."""
        if self.list is None:
            return 1.0
        return len(self.list) / (self.algorithm.t**2 * self.in_channels * -(-self.out_channels // WIDTH))


def pack_gpu(weight: Tensor, bias: Tensor | None, algorithm: GpuAlgorithm, device: torch.device | str) -> GpuPacked:
    """Transform and pack the weight of a 3x3 convolution; in float64, where the weight is.

    Args:
        weight: (C_out, C_in, 3, 3), any floating type.
        bias: (C_out,), or None.
        algorithm: What it is packed for.
        device: Where the packed weight goes.

    Raises: TersenetError: another shape, or empty.
    """
    if weight.ndim != 4 or weight.shape[2:] != (R, R) or 0 in weight.shape or not weight.is_floating_point():
        raise TersenetError(
            f"weight (={weight.dtype} {tuple(weight.shape)}) must be floating and of shape (C_out, C_in, 3, 3); "
            "other convolutions run on torch's own kernels"
        )
    g = torch.from_numpy(np.array(algorithm.transforms.g, dtype=float))
    u = torch.einsum("ai,koij,bj->abok", g, weight.detach().cpu().double(), g)
    return _dense(u.flatten(0, 1), bias, algorithm, device)


def pack_gpu_domain(
    weight: Tensor, bias: Tensor | None, algorithm: GpuAlgorithm, device: torch.device | str, sparse: bool = False
) -> GpuPacked:
    """Pack a weight (t t, C_in, C_out) that is in the Winograd domain already, with tap = t * row + column.

    Args:
        weight: Zero where it is pruned.
        bias: (C_out,), or None.
        algorithm: What it is packed for, with the points that the weight was trained with.
        device: Where the packed weight goes.
        sparse: Leave out the blocks of one input channel by WIDTH output channels that are all zero.

    Raises: TersenetError: another shape, or empty.
    """
    m = algorithm.m
    if weight.ndim != 3 or weight.shape[0] != algorithm.t**2 or 0 in weight.shape or not weight.is_floating_point():
        raise TersenetError(
            f"weight (={weight.dtype} {tuple(weight.shape)}) must be floating and of shape ({algorithm.t**2}, C_in, "
            f"C_out) for F({m}x{m}, 3x3)"
        )
    u = weight.detach().cpu().double()
    if not sparse:
        return _dense(u, bias, algorithm, device)
    scaled, table = _scaled(u, bias, algorithm)
    values, channels, starts = in_blocks(scaled, WIDTH)
    moved = (values.to(device, algorithm.dtype), table.to(device))
    lists = (channels.to(device, torch.int32), starts.to(device))
    return GpuPacked(algorithm, *moved, u.shape[1], u.shape[2], *lists)


def padded_channels(inputs: int, outputs: int) -> tuple[int, int]:
    """As packed weights have them."""
    return -(-inputs // STEP) * STEP, -(-outputs // WIDTH) * WIDTH


def _dense(u: Tensor, bias: Tensor | None, algorithm: GpuAlgorithm, device: torch.device | str) -> GpuPacked:
    """Of a transformed weight (t t, C_in, C_out), float64."""
    _, inputs, outputs = u.shape
    scaled, table = _scaled(u, bias, algorithm)
    wide, high = padded_channels(inputs, outputs)
    packed = pad(scaled, (0, high - outputs, 0, wide - inputs)).to(device, algorithm.dtype)
    return GpuPacked(algorithm, packed.contiguous(), table.to(device), inputs, outputs)


def _scaled(u: Tensor, bias: Tensor | None, algorithm: GpuAlgorithm) -> tuple[Tensor, Tensor]:
    """The weight as it is kept, and its bias with the factors that sums need."""
    outputs = u.shape[2]
    if bias is not None and bias.shape != (outputs,):
        raise TersenetError(f"bias (={tuple(bias.shape)}) must have one value for each of {outputs} output channels")
    scale = torch.ones(outputs, dtype=torch.float64, device="cpu")
    if algorithm.dtype == torch.float16:
        # A power of two for each output channel, so that its taps, which differ a thousandfold, are all normal numbers.
        scale = torch.exp2(_HALF_EXPONENT - torch.frexp(u.abs().amax((0, 1))).exponent.double())
    table = torch.zeros(2, padded_channels(1, outputs)[1], dtype=torch.float32, device="cpu")
    if bias is not None:
        table[0, :outputs] = bias.detach()
    table[1, :outputs] = 1 / (scale * algorithm.scale)
    return u * scale, table
