"""Weights in the form that the product kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.kernels.amx import CHUNK, in_tiles
from tersenet.kernels.generate import POINTS, Algorithm, R, isa_of
from tersenet.kernels.memory import settled
from tersenet.kernels.product import QUAD

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
    g = torch.from_numpy(np.array(algorithm.transforms.g, dtype=float))
    u = torch.einsum("ai,koij,bj->kabo", g, weight.detach().double(), g)
    return _packed(u.flatten(1, 2), bias, algorithm)


def pack_domain(
    weight: Tensor,
    bias: Tensor | None = None,
    m: int = 4,
    isa: str | None = None,
    points: str = POINTS,
    relu: bool = False,
    kept: str = "float",
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

    Raises:
        TersenetError: another shape, empty or not on the CPU; m, isa or a kind of weight that is not offered.
    """
    algorithm = Algorithm(m, isa_of(kept, isa), kept, points, relu)
    check_domain(weight, bias, algorithm)
    return _packed(weight.detach().double().permute(2, 0, 1), bias, algorithm)


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


def _packed(u: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Packed:
    """Of a transformed weight (C_out, t t, C_in), float64."""
    outputs, taps, inputs = u.shape
    block = algorithm.isa.channels
    blocks, _, padded_inputs, _ = packed_shape(algorithm, outputs, inputs)
    scale = torch.ones(outputs, dtype=torch.float64, device="cpu")
    if algorithm.weight == "half":
        # A power of two for each output channel, so that its taps, which differ a thousandfold, are all normal numbers.
        scale = torch.exp2(_HALF_EXPONENT - torch.frexp(u.abs().amax((1, 2))).exponent.double())
    full = torch.zeros(blocks * block, taps, padded_inputs, dtype=torch.float64, device="cpu")
    full[:outputs, :, :inputs] = u * scale[:, None, None]
    if algorithm.parts:
        packed = settled(in_tiles(full.float(), algorithm.isa, algorithm.parts))
        packed = packed.view(packed_shape(algorithm, outputs, inputs))
    else:
        full = full.to(WEIGHT_TYPES[algorithm.weight])
        packed = settled(full.reshape(blocks, block, taps, padded_inputs).permute(0, 2, 3, 1))
    padded = torch.zeros(2, blocks * block, dtype=torch.float32, device="cpu")
    if bias is not None:
        padded[0, :outputs] = bias.detach()
    padded[1, :outputs] = 1 / scale
    return Packed(algorithm, packed, padded, inputs, outputs)


def packed_shape(algorithm: Algorithm, out_channels: int, in_channels: int) -> tuple[int, int, int, int]:
    """(blocks of output channels, taps, C_in, channels of a block), padded to whole blocks and quads; of one in
    bfloat16 C_in is padded to whole tiles, and there are one or two parts for each channel."""
    block = algorithm.isa.channels
    if algorithm.parts:
        return -(-out_channels // block), algorithm.t**2, -(-in_channels // CHUNK) * CHUNK, algorithm.parts * block
    return -(-out_channels // block), algorithm.t**2, -(-in_channels // QUAD) * QUAD, block
