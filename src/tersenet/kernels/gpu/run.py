"""One call of a Triton convolution: scratch memory, launches, and which way is the fastest."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersenet.kernels.gpu.host import kernels
from tersenet.kernels.gpu.pack import PRECISIONS, WIDTH, GpuAlgorithm
from tersenet.kernels.gpu.timing import fastest
from tersenet.kernels.layout import output_shape
from tersenet.ops.cook_toom import Matrix

SCRATCH_BYTES = 256 * 2**20
"""Of V and M together, unless one tile takes more: larger maps are computed in stretches of tiles."""

_BLOCK = 128
"""The most tiles that a program takes of a pruned layer: V has room for whole blocks of them."""

Rows = tuple[tuple[int | float, ...], ...]


class Tables(NamedTuple):
    """A packed weight; of a pruned one `list` and `starts` too."""

    weight: Tensor
    bias: Tensor
    list: Tensor | None = None
    starts: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One convolution of tensors that have been checked, in channels-last memory."""

    x: Tensor
    y: Tensor
    residual: Tensor | None
    tables: Tables
    padding: tuple[int, int]
    algorithm: GpuAlgorithm
    activation: str

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles (down, across) of one image."""
        return -(-self.y.shape[2] // self.algorithm.m), -(-self.y.shape[3] // self.algorithm.m)

    @property
    def tiles(self) -> int:
        return self.y.shape[0] * math.prod(self.grid)

    @property
    def ways(self) -> dict[str, Callable[[], None]]:
        """All that compute it, the one that always fits first. They differ in the order of sums only."""
        if self.tables.list is not None:
            return {"kept": self._stepwise}
        found: dict[str, Callable[[], None]] = {"stepwise": self._stepwise}
        exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
        if self.x.dtype == torch.float32 and PRECISIONS[self.algorithm.isa] == "ieee" and exact:
            found["library"] = partial(self._stepwise, library=True)
        if self.algorithm.m == 2:  # with more taps there are too few registers, and compiling takes minutes
            found["fused"] = self._fused
        return found

    def _stepwise(self, library: bool = False) -> None:
        """Input transform, products tap by tap, output transform; all of it for as many tiles as `SCRATCH_BYTES` holds.

        `library`: products by torch.bmm.
        """
        algorithm, tables, made = self.algorithm, self.tables, kernels()
        sparse = tables.list is not None
        taps, outputs = algorithm.t**2, tables.bias.shape[1]
        wide = self.x.shape[1] if sparse else tables.weight.shape[1]
        most = max(1, SCRATCH_BYTES // (taps * (wide * self.x.element_size() + outputs * 4)))
        stretches = -(-self.tiles // most)
        step = -(-self.tiles // stretches)
        pitch = -(-step // _BLOCK) * _BLOCK if sparse else step
        v = self.x.new_empty(taps * wide * pitch)
        m = self.x.new_empty(taps * step * outputs, dtype=torch.float32)
        size = step.bit_length()
        at, bt = matrices(algorithm)
        for first in range(0, self.tiles, step):
            tiles = min(step, self.tiles - first)
            strides = (wide * pitch, 1, pitch) if sparse else (wide * tiles, wide, 1)
            made.transform_input[_blocks(tiles, wide, "BLOCK_P", "BLOCK_C")](
                self.x, v, first, tiles, self.x.shape[1], wide, *self.x.shape[2:], *self.grid, *self.padding,
                *_places(self.x), *strides, size, bt, algorithm.m, algorithm.scale, algorithm.relu, **_OPTIONS,
            )  # fmt: skip
            if tables.list is not None:
                made.multiply_kept[_kept_blocks(tiles, outputs // WIDTH, taps)](
                    v, tables.weight, tables.list, tables.starts, m, tiles, pitch, wide, outputs, len(tables.list),
                    size, PRECISIONS[algorithm.isa], WIDTH, **_OPTIONS,
                )  # fmt: skip
            elif library:
                sums = m[: taps * tiles * outputs].view(taps, tiles, outputs)
                torch.bmm(v[: taps * tiles * wide].view(taps, tiles, wide), tables.weight, out=sums)
            else:
                made.multiply[_product_blocks(tiles, outputs, taps)](
                    v, tables.weight, m, tiles, wide, outputs, size, PRECISIONS[algorithm.isa], **_OPTIONS
                )
            made.transform_output[_blocks(tiles, self.y.shape[1], "BLOCK_P", "BLOCK_K")](
                m, self.y, tables.bias, self.residual, first, tiles, self.y.shape[1], outputs, *self.y.shape[2:],
                *self.grid, *_places(self.y), *_places(self.residual), size, at,
                self.residual is not None, self.activation, **_OPTIONS,
            )  # fmt: skip

    def _fused(self) -> None:
        algorithm, x, y = self.algorithm, self.x, self.y
        weight, bias = self.tables.weight, self.tables.bias
        at, bt = matrices(algorithm)
        kernels().convolve[_product_blocks(self.tiles, weight.shape[2])](
            x, weight, y, bias, self.residual, self.tiles, x.shape[1], weight.shape[1], y.shape[1], weight.shape[2],
            *x.shape[2:], *y.shape[2:], *self.grid, *self.padding, *_places(x), *_places(y), *_places(self.residual),
            self.tiles.bit_length(), at, bt, algorithm.scale, algorithm.relu, self.residual is not None,
            self.activation, PRECISIONS[algorithm.isa], **_OPTIONS,
        )  # fmt: skip


def run(
    x: Tensor,
    tables: Tables,
    residual: Tensor | None,
    padding: tuple[int, int],
    out_channels: int,
    algorithm: GpuAlgorithm,
    activation: str,
    way: str | None = None,
) -> Tensor:
    """The convolution of `x` with a packed weight, in channels-last memory. Arguments must have been checked.

    `way`: a name of `Call.ways`; by default the fastest, which is measured at the first call for tensors of a shape.
    """
    x = _channels_last(x)
    if residual is not None:
        residual = _channels_last(residual)
    shape = output_shape((x.shape[0], x.shape[1], x.shape[2], x.shape[3]), out_channels, padding)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not y.numel():
        return y
    call = Call(x, y, residual, tables, padding, algorithm, activation)
    ways = call.ways
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if way is None and len(ways) > 1 and x.is_cuda:
            key = (tuple(x.shape), out_channels, padding, algorithm, activation, residual is not None, x.device, *ways)
            way = fastest(key, ways)
        ways[way or next(iter(ways))]()
    return y


@cache
def matrices(algorithm: GpuAlgorithm) -> tuple[Rows, Rows]:
    """A^T and B^T as the kernels take them."""
    return _rows(algorithm.transforms.at), _rows(algorithm.transforms.bt)


def _rows(matrix: Matrix) -> Rows:
    kept = [[(place, float(factor)) for place, factor in enumerate(row) if factor] for row in matrix]
    return tuple(tuple(chain.from_iterable(pairs)) for pairs in kept)


_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Said to Triton, whose default is about to change."""

Grid = Callable[[dict[str, int]], tuple[int, ...]]


def _blocks(tiles: int, channels: int, *names: str) -> Grid:
    return lambda made: (-(-tiles // made[names[0]]), -(-channels // made[names[1]]))


def _product_blocks(tiles: int, outputs: int, taps: int = 1) -> Grid:
    return lambda made: (-(-tiles // made["BLOCK_P"]) * -(-outputs // made["BLOCK_K"]), taps)


def _kept_blocks(tiles: int, blocks: int, taps: int) -> Grid:
    return lambda made: (-(-tiles // made["BLOCK_P"]), blocks, taps)


def _places(x: Tensor | None) -> tuple[int, int, int]:
    """How far apart images, rows and columns are in memory."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(2), x.stride(3))


def _channels_last(x: Tensor) -> Tensor:
    """`x` as it is if the channels of each pixel lie together, else copied so."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous(memory_format=torch.channels_last)
