"""Integer arithmetic in place of floating-point scales: a factor is an integer and a shift.

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
CVPR 2018, section 2.2; here with 64-bit sums, and ties to the even level as fake quantization rounds them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tersenet.errors import TersenetError

WORD = 62
"""Bits that a sum may have: an int64's but for the sign and the rounding."""


class FixedPoint(NamedTuple):
    """`values` / 2^shift: integers (int64) that stand for real numbers."""

    values: Tensor
    shift: int


def bit_length(bound: float) -> int:
    """Bits of the magnitudes up to `bound`."""
    return max(1, math.ceil(math.log2(bound + 1)))


def fixed_point(factors: Tensor, bits: int, most: int = WORD) -> FixedPoint:
    """The factors in at most `bits` bits each: exact where they are multiples of a power of two that fits.

    Args:
        factors: float64, any shape.
        most: The largest shift.

    Raises:
        TersenetError: the largest needs more bits than there are.
    """
    largest = float(factors.abs().max())
    # Small factors have zeros behind the point, which cost no bits.
    room = bits - math.ceil(math.log2(largest)) if 0 < largest < math.inf else -1 if largest else bits
    if room < 0:
        raise TersenetError(f"a factor of {largest:.3g} does not fit into {bits} bits: the scales lie too far apart")
    shift = next((k for k in range(min(room, most)) if _whole(factors * 2.0**k)), min(room, most))
    return FixedPoint((factors * 2.0**shift).round().to(torch.int64), shift)


def _whole(values: Tensor) -> bool:
    return torch.equal(values, values.round())


def shifted(sums: Tensor, shift: int) -> Tensor:
    """sums / 2^shift, rounded, ties to even; integers throughout."""
    if shift == 0:
        return sums
    down = sums >> shift
    rest = sums - (down << shift)
    half = 1 << (shift - 1)
    up = (rest > half) | ((rest == half) & (down & 1 == 1))
    return down + up.to(sums.dtype)


class Rescaling(NamedTuple):
    """sums -> levels: `sums` / 2^before * factors / 2^after, each shift rounded."""

    before: int
    factors: Tensor
    after: int

    def __call__(self, sums: Tensor) -> Tensor:
        return shifted(shifted(sums.to(torch.int64), self.before) * self.factors, self.after)


def rescaling(factors: Tensor, bound: float) -> Rescaling:
    """By `factors` (float64) of sums up to `bound`: half of the word for the sum, the rest for the factor."""
    bits = min(bit_length(bound), WORD // 2)
    before = bit_length(bound) - bits
    found = fixed_point(factors * 2.0**before, WORD - bits)
    return Rescaling(before, found.values, found.shift)


def narrow(bound: float) -> torch.dtype:
    """The smallest of int32 and int64 that holds sums up to `bound`.

    Raises:
        TersenetError: neither does.
    """
    if bit_length(bound) > WORD:
        raise TersenetError(f"sums up to {bound:.3g} do not fit into 64-bit integers: use fewer bits")
    return torch.int32 if bit_length(bound) <= 31 else torch.int64
