"""A quantized layer as its kernels read it: bytes of the weight, and tables of factors."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels.host import Isa
from tersenet.kernels.int8 import Int8, Matrix, int8_isa
from tersenet.kernels.int8_product import CHUNK, QUADS, has_tiles
from tersenet.kernels.int8_winograd import LINE, PLACES
from tersenet.kernels.memory import settled
from tersenet.kernels.winograd import Tables

Pair = tuple[int, int]
Rounded = tuple[float, int, int]
"""Scale, lowest and highest level."""

MOST_PRODUCTS = (2**31 - 1) // (255 * 128)
"""Of which a sum of 32 bits may be made."""


@dataclass(frozen=True)
class Level:
    """How a tensor is rounded: to whole numbers from `lowest` to `highest`, times `scale`: of one number, of one for
    each tap (taps, 1), or of one for each tap and output channel (taps, C_out); float64."""

    scale: Tensor
    lowest: int
    highest: int

    @property
    def one(self) -> float:
        """The scale, where there is one."""
        return float(self.scale)

    @property
    def bounds(self) -> tuple[int, int]:
        """Lowest and highest level."""
        return self.lowest, self.highest

    @property
    def rounded(self) -> Rounded:
        """All of it, where there is one scale."""
        return self.one, self.lowest, self.highest


@dataclass(frozen=True)
class Moves:
    """Of a convolution: padding (top, bottom, left, right)."""

    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)

    def reach(self, axis: int) -> int:
        """Pixels from the first to the last tap."""
        return self.dilation[axis] * (self.kernel[axis] - 1) + 1

    def out(self, size: int, axis: int) -> int:
        """Rows or columns of the output, for so many of the input."""
        pads = self.padding[2 * axis : 2 * axis + 2]
        return (size + sum(pads) - self.reach(axis)) // self.stride[axis] + 1

    @property
    def phases(self) -> Pair:
        """Of the stride, those that are read."""
        return min(self.stride[0], self.reach(0)), min(self.stride[1], self.reach(1))

    def places(self) -> list[tuple[int, int, int]]:
        """Of each tap: its phase, and rows and columns within that."""
        high, wide = (range(0, self.reach(axis), self.dilation[axis]) for axis in (0, 1))
        (step_high, step_wide), columns = self.stride, self.phases[1]
        return [
            (row % step_high * columns + column % step_wide, row // step_high, column // step_wide)
            for row in high
            for column in wide
        ]


@dataclass(frozen=True)
class Integers:
    """What a quantized convolution computes:

        x -> levels of `input`
        direct: y = sum over taps and C_in of level * weight * scale + bias
        Winograd: V = levels of `transformed` of B^T d B;  M = levels of `product`, if any, of the sums over C_in;
            y = A^T M A + bias
        y -> levels of `output`, if any -> y * factor + summand

    weight: (taps, C_in, C_out) int8: rows and columns of the kernel, or of a tile. scale (taps or 1, C_out or 1),
        float64. bias, factor, summand: (C_out,) or None. at (m, t), bt (t, t): for Winograd.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    factor: Tensor | None
    summand: Tensor | None
    input: Level
    output: Level | None
    at: Tensor | None = None
    bt: Tensor | None = None
    transformed: Level | None = None
    product: Level | None = None

    def algorithm(self, isa: str | None = None) -> Int8:
        """Its code. Raises: TersenetError where this processor has no kernels for it."""
        found = int8_isa(isa)
        if self.at is None or self.bt is None:
            return Int8(found, output=self.output is not None)
        rounds = self.product is not None, self.output is not None
        return Int8(found, _matrix(self.at), _matrix(self.bt), *rounds)


@dataclass(frozen=True, eq=False)
class PackedInt8:
    """`tables.weight` has the bytes of U and, `initial` bytes behind its begin, what sums start with. `tables.list` has
    a factor for each tap of the transformed input and, from 64 on, one for the sums of each tap, and one for their
    levels, `factors` floats further; `factor_tap` floats apart, and if they are `wide` for each output channel.
    `tables.bias`: factor and summand of each channel's result, and those behind its rounding."""

    algorithm: Int8
    moves: Moves
    tables: Tables
    in_channels: int
    out_channels: int
    taps: int
    initial: int
    wide: bool
    factor_tap: int
    factors: int
    input: Rounded
    transformed: tuple[int, int]
    product: tuple[int, int]
    output: tuple[int, int]


def pack_int8(layer: Integers, moves: Moves, isa: str | None = None) -> PackedInt8:
    """Pack `layer`, for one of `INT8_ISAS` that this processor has; the best by default.

    Raises: TersenetError for weights that are no bytes, sums that may not fit into 32 bits, or another processor.
    """
    algorithm = layer.algorithm(isa)
    taps, inputs, outputs = layer.weight.shape
    if layer.weight.dtype != torch.int8:
        raise TersenetError(f"weight (={layer.weight.dtype}) must be int8")
    terms = inputs * (1 if algorithm.at else taps)
    if terms > MOST_PRODUCTS:
        raise TersenetError(f"a sum of {terms} products may not fit into 32 bits; {MOST_PRODUCTS} do in any case")
    u, first = _weights(layer.weight, algorithm.isa, bool(algorithm.at))
    rows, wide, factors = _factors(layer, algorithm.isa)
    starts = torch.tensor([(0, 0, 0)] if algorithm.at else moves.places(), dtype=torch.int64)
    places = settled(torch.cat((u, first.contiguous().view(torch.int8).flatten())))
    return PackedInt8(
        algorithm, moves, Tables(places, _epilogue(layer, algorithm.isa), rows, starts), inputs, outputs,
        1 if algorithm.at else taps, len(u), wide, factors[0], factors[1],
        layer.input.rounded,
        (0, 0) if layer.transformed is None else layer.transformed.bounds,
        (0, 0) if layer.product is None else layer.product.bounds,
        (0, 0) if layer.output is None else layer.output.bounds,
    )  # fmt: skip


def _weights(weight: Tensor, isa: Isa, by_tap: bool) -> tuple[Tensor, Tensor]:
    """U as bytes in order, and the first value of each sum (blocks, taps or 1, channels) as int32."""
    taps, inputs, outputs = weight.shape
    padded = F.pad(weight, (0, -outputs % isa.channels, 0, -inputs % CHUNK))
    blocks = padded.shape[2] // isa.channels
    tiles = padded.view(taps, -1, QUADS, 4, blocks, isa.columns, isa.width)
    # taps, chunk, quad, 4, block, column, output -> block, tap, chunk, column, quad, output, 4
    u = tiles.permute(4, 0, 1, 5, 2, 6, 3).flatten()
    if has_tiles(isa):
        return u, torch.zeros(blocks, taps if by_tap else 1, isa.channels, dtype=torch.int32)
    sums = padded.sum(1, dtype=torch.int64)
    sums = sums if by_tap else sums.sum(0, keepdim=True)
    first = -128 * sums.view(-1, blocks, isa.channels).transpose(0, 1)
    return u, first.to(torch.int32)


def _factors(layer: Integers, isa: Isa) -> tuple[Tensor, bool, tuple[int, int]]:
    """The table of factors in the Winograd domain, whether it has one for each channel, and its strides."""
    if layer.transformed is None:
        return torch.zeros(1), False, (0, 0)
    taps, _, outputs = layer.weight.shape
    unit = layer.transformed.scale * layer.scale
    levels = [unit] if layer.product is None else [unit / layer.product.scale, layer.product.scale.expand(taps, -1)]
    wide = max(one.shape[1] for one in levels) > 1
    width = -(-outputs // isa.channels) * isa.channels if wide else LINE
    table = torch.zeros(PLACES + 2 * taps * width)
    table[:taps] = (layer.input.scale / layer.transformed.scale).expand(taps, 1)[:, 0]
    rows = table[PLACES:].view(2, taps, width)
    for row, one in zip(rows, levels, strict=False):
        full = one.expand(taps, outputs if wide else width)
        row[:, : full.shape[1]] = full
    return table, wide, (width, taps * width)


def _epilogue(layer: Integers, isa: Isa) -> Tensor:
    """(4, padded C_out): factor and summand, and those behind the rounding."""
    outputs = layer.weight.shape[2]
    ones = torch.ones(outputs, dtype=torch.float64)
    bias = 0 * ones if layer.bias is None else layer.bias.double()
    factor = ones if layer.factor is None else layer.factor.double()
    summand = 0 * ones if layer.summand is None else layer.summand.double()
    unit = ones if layer.transformed is not None else (layer.input.scale * layer.scale * ones).flatten()
    if layer.output is None:
        rows = [unit * factor, bias * factor + summand, ones, ones]
    else:
        step = layer.output.one
        rows = [unit / step, bias / step, step * factor, summand]
    return F.pad(torch.stack(rows).float(), (0, -outputs % isa.channels))


def _matrix(values: Tensor) -> Matrix:
    return tuple(tuple(Fraction(float(x)) for x in row) for row in values)
