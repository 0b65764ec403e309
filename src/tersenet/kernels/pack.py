"""Weights in the form that the product kernels read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels.amx import CHUNK, in_tiles
from tersenet.kernels.generate import POINTS, Algorithm, R, isa_of
from tersenet.kernels.memory import room
from tersenet.kernels.product import QUAD
from tersenet.ops.winograd import kronecker

WEIGHT_TYPES = {"float": torch.float32, "half": torch.float16, "parts": torch.bfloat16, "bfloat16": torch.bfloat16}
# The largest weight of a channel is below 2^14; the smallest normal one is 2^-14.
_HALF_EXPONENT = 14


@dataclass(frozen=True)
class Packed:
    """A transformed weight and its bias, for one algorithm on one set of instructions.

    `weight` is of `packed_shape`, padded with zeros; `bias` has each channel's bias and the factor that its sums need,
    padded to whole blocks.
    """

    algorithm: Algorithm
    weight: Tensor
    bias: Tensor
    in_channels: int
    out_channels: int


def pack(weight: Tensor, bias: Tensor | None = None, m: int = 4, isa: str | None = None, kept: str = "float") -> Packed:
    """Transform and pack the weight of a 3x3 convolution for F(m x m, 3 x 3).

    Args:
        weight: (C_out, C_in, 3, 3), any floating type; transformed in float64.
        bias: (C_out,), or None.
        m: 2, 4 or 6. The packed weight has (m + 2)^2 / 9 times the size.
        isa: A set of vector instructions that this processor has; the best by default.
        kept: "float"; "half", which keeps the transformed weight in 16 bits (11 of them significant) and calculates in
            float32: half the memory traffic, which limits layers with many channels and few pixels, at a relative error
            of about 4e-4 for F2, 2e-3 for F4 and 4e-3 for F6; "parts", which makes the products of bfloat16 parts on
            AMX's tiles: 7e-6 for F2, 4e-5 for F4; or "bfloat16", the same with transformed inputs and weights rounded
            to one such part: 4e-3 for F2.

    Raises:
        TersenetError: another shape, empty or not on the CPU; m, isa or a kind of weight that is not offered.
    """
    algorithm = Algorithm(m, isa_of(kept, isa), kept)
    if weight.ndim != 4 or weight.shape[2:] != (R, R) or 0 in weight.shape or not weight.is_floating_point():
        raise TersenetError(
            f"weight (={weight.dtype} {tuple(weight.shape)}) must be floating and of shape (C_out, C_in, 3, 3); "
            "other convolutions run on torch's own kernels"
        )
    _check_bias(weight, bias, weight.shape[0])
    gg = kronecker(torch.from_numpy(np.array(algorithm.transforms.g, dtype=float)))

    def transformed(outputs: slice) -> Tensor:
        return gg @ weight[outputs].detach().double().flatten(2).transpose(1, 2)

    return _packed(transformed, weight.shape[0], weight.shape[1], bias, algorithm)


def pack_domain(
    weight: Tensor,
    bias: Tensor | None = None,
    m: int = 4,
    isa: str | None = None,
    points: str = POINTS,
    relu: bool = False,
    kept: str = "float",
    threshold: float = 0.0,
) -> Packed:
    """Pack a weight that is in the Winograd domain already, zeros and all.

    Args:
        weight: (t t, C_in, C_out) with t = m + 2, tap = t * row + column.
        bias: (C_out,), or None.
        m: 2, 4 or 6.
        isa: A set of vector instructions that this processor has; the best by default.
        points: Of the transforms that the weight was trained with.
        relu: Whether the layer has its ReLU behind the input transform.
        kept: "float", "half", "parts" or "bfloat16", see `pack`.
        threshold: What is no further than that from zero behind the input transform counts as zero.

    Raises:
        TersenetError: another shape, empty or not on the CPU; m, isa or a kind of weight that is not offered.
    """
    algorithm = Algorithm(m, isa_of(kept, isa), kept, points, relu, threshold)
    check_domain(weight, bias, algorithm)

    def transformed(outputs: slice) -> Tensor:
        return weight[:, :, outputs].detach().double().permute(2, 0, 1)

    return _packed(transformed, weight.shape[2], weight.shape[1], bias, algorithm)


def check_domain(weight: Tensor, bias: Tensor | None, algorithm: Algorithm) -> None:
    """Raises: TersenetError for a weight that is none of the Winograd domain of `algorithm`, or a bias of another."""
    m = algorithm.m
    if weight.ndim != 3 or weight.shape[0] != algorithm.t**2 or 0 in weight.shape or not weight.is_floating_point():
        raise TersenetError(
            f"weight (={weight.dtype} {tuple(weight.shape)}) must be floating and of shape ({algorithm.t**2}, C_in, "
            f"C_out) for F({m}x{m}, 3x3)"
        )
    _check_bias(weight, bias, weight.shape[2])


def _check_bias(weight: Tensor, bias: Tensor | None, outputs: int) -> None:
    if bias is not None and bias.shape != (outputs,):
        raise TersenetError(f"bias (={tuple(bias.shape)}) must have one value for each of {outputs} output channels")
    if weight.device.type != "cpu":
        raise TersenetError(f"weight is on {weight.device}; the CPU kernels take CPU tensors")


def _packed(
    transformed: Callable[[slice], Tensor], outputs: int, inputs: int, bias: Tensor | None, algorithm: Algorithm
) -> Packed:
    """Of a weight that is `transformed` for a slice of output channels: (outputs, t t, C_in), float64. A block of them
    at a time stays in the cache."""
    block, kind = algorithm.isa.channels, WEIGHT_TYPES[algorithm.weight]
    blocks, taps, padded_inputs, width = packed_shape(algorithm, outputs, inputs)
    packed = room((blocks, taps, padded_inputs, width), kind)
    padded = torch.zeros(2, blocks * block, dtype=torch.float32, device="cpu")
    if bias is not None:
        padded[0, :outputs] = bias.detach()
    for number in range(blocks):
        part = slice(number * block, min(outputs, (number + 1) * block))
        u = transformed(part)
        if algorithm.weight == "half":
            # A power of two for each output channel, so that its taps, which differ a thousandfold, are normal numbers.
            exponents = _HALF_EXPONENT - torch.frexp(u.abs().amax((1, 2))).exponent.double()
            u = u * torch.exp2(exponents)[:, None, None]
            padded[1, part] = torch.exp2(-exponents).float()
        else:
            padded[1, part] = 1
        if u.shape != (block, taps, padded_inputs):
            u = F.pad(u, (0, padded_inputs - inputs, 0, 0, 0, block - len(u)))
        if algorithm.parts:
            packed[number] = in_tiles(u.float(), algorithm.isa, algorithm.parts).view(taps, padded_inputs, width)
        else:
            packed[number] = u.to(kind).permute(1, 2, 0)
    return Packed(algorithm, packed, padded, inputs, outputs)


def packed_shape(algorithm: Algorithm, out_channels: int, in_channels: int) -> tuple[int, int, int, int]:
    """(blocks of output channels, taps, C_in, channels of a block), padded to whole blocks and quads; of one in
    bfloat16 C_in is padded to whole tiles, and there are one or two parts for each channel."""
    block = algorithm.isa.channels
    if algorithm.parts:
        return -(-out_channels // block), algorithm.t**2, -(-in_channels // CHUNK) * CHUNK, algorithm.parts * block
    return -(-out_channels // block), algorithm.t**2, -(-in_channels // QUAD) * QUAD, block
