"""The stages of a Winograd convolution one by one, for `winograd.py`, its gradient, and folded and integer layers.

    tiles D (t t, groups, P, C)   input V = BB D     weight U = GG W (t t, groups, C, K)   product M = V U
    output Y (m m, groups, P, K) = AA M

with P = images * tiles, C and K channels per group, and AA, GG, BB the Kronecker squares of A^T, G, B^T.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016; the stages that are quantized,
from Fernandez-Marques et al., Searching for Winograd-aware Quantized Networks, MLSys 2020, arXiv 2002.10711.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tersenet.ops.fake_quantize import Rounding, batch_range, joined_range, moving_range, scale_of
from tersenet.ops.winograd_tiles import Geometry, output_image

STAGES = ("input", "weight", "input_winograd", "weight_winograd", "product", "output")
"""What can be rounded, in the order of the arguments. Scales broadcast against x (N, C, H, W), the weight
(K, C / groups, kH, kW), V (t t, groups, P, C), U (t t, groups, C, K), M (t t, groups, P, K) and the output, and are the
same for all images and tiles."""
INPUT, WEIGHT, INPUT_WINOGRAD, WEIGHT_WINOGRAD, PRODUCT, OUTPUT = range(len(STAGES))
"""Their places in that order."""

_CACHED = 2**19
"""Numbers of one transient tensor that are worth computing at once on a CPU: 2 MiB."""
_ROWS = 64
"""Rows of V that are worth multiplying at once: with fewer, reading U takes longer than the products."""

_TERMS = 10
"""Terms of a long sum that are added up before the next ones."""


@dataclass(frozen=True)
class Stage:
    """One tensor that is rounded. Its state is the scale, or with `observing` the range before this batch."""

    rounding: Rounding
    observing: Literal["no", "moving", "joined"] = "no"
    momentum: float = 0.01

    def settle(self, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale, and the range with this batch in it if that is observed."""
        found = None if self.observing == "no" else batch_range(values, self.rounding.shape)
        return self.settled(found, state, values.dtype)

    def settled(self, found: Tensor | None, state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """`settle` with the range of the values, which is None if it is not observed."""
        if found is None:
            return state.to(dtype), None
        new = found.to(state.dtype)
        moved = joined_range(state, new) if self.observing == "joined" else moving_range(state, new, self.momentum)
        return scale_of(moved, self.rounding).to(dtype), moved


class Stages(NamedTuple):
    """The tensors that are rounded; None is left as it is."""

    input: Stage | None = None
    weight: Stage | None = None
    input_winograd: Stage | None = None
    weight_winograd: Stage | None = None
    product: Stage | None = None
    output: Stage | None = None


class Matrices(NamedTuple):
    """Kronecker squares of A^T, G and B^T: (m m, t t), (t t, r r), (t t, t t)."""

    aa: Tensor
    gg: Tensor
    bb: Tensor


def kronecker(matrix: Tensor) -> Tensor:
    """(a, b) -> (a a, b b): the matrix applied to both axes of a tile at once; differentiable."""
    a, b = matrix.shape
    return (matrix[:, None, :, None] * matrix[None, :, None, :]).reshape(a * a, b * b)


def transformed(matrix: Tensor, taps: Tensor) -> Tensor:
    """(a, b) times (sqrt b, sqrt b, groups, ..., C) -> (a, groups, P, C)."""
    groups, channels = taps.shape[2], taps.shape[-1]
    return _summed(matrix, taps.reshape(matrix.shape[1], -1)).view(matrix.shape[0], groups, -1, channels)


def _summed(matrix: Tensor, taps: Tensor) -> Tensor:
    """(a, b) times (b, n). The error of a sum grows with the root of how many terms follow each other: where that is
    felt, from 9 x 9 taps on, a few rows of taps are summed at a time, and then their sums."""
    terms = matrix.shape[1]
    if max(matrix.shape) <= 64:
        return matrix @ taps
    found = matrix[:, :_TERMS] @ taps[:_TERMS]
    for first in range(_TERMS, terms, _TERMS):
        found.addmm_(matrix[:, first : first + _TERMS], taps[first : first + _TERMS])
    return found


def products(a: Tensor, b: Tensor) -> Tensor:
    """(t t, groups, i, j) times (t t, groups, j, k), each tap and group a matrix product of its own."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def assembled(
    aa: Tensor, product: Tensor, bias: Tensor | None, geometry: Geometry, size: tuple[int, int, int], nhwc: bool
) -> Tensor:
    """AA M, with the bias, as an image. `size` is the input's N, H, W."""
    n, h, w = size
    groups, channels = product.shape[1], product.shape[3]
    m, (_, _, dh), (_, _, dw) = geometry.tile, geometry.axis(0), geometry.axis(1)
    shape = m, m, groups, n * dh * dw, geometry.tiles(h, 0), geometry.tiles(w, 1), channels
    y = _summed(aa, product.view(aa.shape[1], -1)).view(shape)
    y = output_image(y, geometry, size, nhwc)
    return y if bias is None else y.add_(bias.to(y.dtype).view(-1, 1, 1))


def images_at_once(x: Tensor, weight: Tensor, geometry: Geometry) -> int | None:
    """As many images as keep V and M in the cache, which halves the time; None: all of them.

    A program that is compiled or exported takes all: it may be for any number of images, and compilers do this by
    themselves.
    """
    if x.is_meta or torch.compiler.is_compiling() or not isinstance(x.shape[0], int):  # pyright: ignore[reportUnnecessaryIsInstance]
        return None
    (_, sh, dh), (_, sw, dw) = geometry.axis(0), geometry.axis(1)
    rows = geometry.tiles(x.shape[2], 0) * geometry.tiles(x.shape[3], 1) * dh * dw
    one = (geometry.tile + geometry.taps - 1) ** 2 * rows * max(x.shape[1] * sh * sw, weight.shape[0])
    # Other devices are filled only by much more, and what is transient has to be bounded all the same.
    cached = _CACHED if x.device.type == "cpu" else _CACHED * 256
    size = max(1, cached // one, -(-_ROWS // rows))
    return None if size >= x.shape[0] else size


def split(x: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """The tensor a few images at a time; the tensor itself if that is all of them."""
    return (x,) if size is None else x.split(size)


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    # Half precision would cost F(4, 3) two digits.
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)  # pyright: ignore[reportReturnType]
