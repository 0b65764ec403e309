"""What a layer with its weight in the Winograd domain does around its products: image to taps, taps to image, and back.

    taps  V = B^T d B of every tile    image  y = A^T M A    their adjoints for the gradients

In torch's operators, by the Kronecker squares of the matrices; and on a CPU by generated code, which goes through
memory once where those go four times.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tersenet.kernels.host import Isa
from tersenet.kernels.observed import observed
from tersenet.kernels.tile_passes import TilePass
from tersenet.kernels.tile_passes_call import best_isa, empty_taps, tile_pass
from tersenet.ops.cook_toom import Matrix, Transforms
from tersenet.ops.winograd_tiles import (
    Geometry,
    channels_last,
    input_tiles,
    input_tiles_adjoint,
    output_image,
    output_image_adjoint,
    padded_image,
)

_CACHED = 2**19
"""Numbers of one transient tensor that are worth computing at once on a CPU."""
_WORTH = 2**14
"""Numbers of V from which on generated code is worth asking for."""


class Passes(ABC):
    """The passes of one layer. Images are (N, C, H, W), taps (t t, P, C); P counts images and tiles.

    dtype: what is computed in. cached: numbers of one transient tensor that are worth computing at once.
    """

    cached = _CACHED

    def __init__(self, geometry: Geometry, dtype: torch.dtype) -> None:
        self.geometry, self.dtype = geometry, dtype

    @abstractmethod
    def taps(self, x: Tensor, relu: bool) -> Tensor:
        """B^T d B of the tiles d of x, or its ReLU."""

    @abstractmethod
    def product(self, taps: Tensor, weight: Tensor) -> Tensor:
        """(t t, P, C) times (t t, C, K) -> (t t, P, K)."""

    @abstractmethod
    def image(self, product: Tensor, size: tuple[int, int, int], nhwc: bool) -> Tensor:
        """A^T M A, put together: (N, K, H', W'), of an input of the size (N, H, W). `nhwc`: better in that order."""

    @abstractmethod
    def product_gradient(self, dy: Tensor, h: int, w: int) -> Tensor:
        """That of the products from the image's; h and w are the input's."""

    @abstractmethod
    def input_gradient(self, d_taps: Tensor, gate: Tensor | None, shape: torch.Size) -> Tensor:
        """That of the input from the taps', which count only where `gate`, the taps after a ReLU, is positive."""

    def chunks(self, x: Tensor, weight: Tensor) -> Sequence[Tensor]:
        """Images a few at a time: what is transient then stays in the cache, which takes two thirds of the time."""
        # While a graph is exported, the batch may be of any size.
        if not isinstance(x.shape[0], int) or x.is_meta:  # pyright: ignore[reportUnnecessaryIsInstance]
            return (x,)
        high, wide = self.tiles(x.shape[2], x.shape[3])
        one = weight.shape[0] * high * wide * max(weight.shape[1:])
        return x.split(max(1, (self.cached if x.device.type == "cpu" else self.cached * 256) // one))

    def tiles(self, h: int, w: int) -> tuple[int, int]:
        """Of an image of so many rows and columns, along both axes."""
        return self.geometry.tiles(h, 0), self.geometry.tiles(w, 1)


class TorchPasses(Passes):
    """By the Kronecker squares `aa` (m m, t t) and `bb` (t t, t t) of A^T and B^T, in their type."""

    def __init__(self, geometry: Geometry, aa: Tensor, bb: Tensor) -> None:
        super().__init__(geometry, bb.dtype)
        self._aa, self._bb = aa, bb

    def taps(self, x: Tensor, relu: bool) -> Tensor:
        tiles = input_tiles(padded_image(x, self.geometry), self.geometry)
        taps = _transform(self._bb, tiles.reshape(tiles.shape[0] * tiles.shape[1], -1, tiles.shape[-1]))
        return taps.clamp_(min=0) if relu else taps

    def product(self, taps: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(taps, weight)

    def image(self, product: Tensor, size: tuple[int, int, int], nhwc: bool) -> Tensor:
        n, h, w = size
        y, m = _transform(self._aa, product), self.geometry.tile
        y = y.view(m, m, 1, n, *self.tiles(h, w), product.shape[2])
        return output_image(y, self.geometry, size, nhwc)

    def product_gradient(self, dy: Tensor, h: int, w: int) -> Tensor:
        tiles = output_image_adjoint(dy, self.geometry, h, w)
        return _transform(self._aa.t(), tiles.flatten(0, 1).flatten(1, -2))

    def input_gradient(self, d_taps: Tensor, gate: Tensor | None, shape: torch.Size) -> Tensor:
        if gate is not None:
            d_taps = torch.ops.aten.threshold_backward(d_taps, gate, 0)
        t = self.geometry.tile + self.geometry.taps - 1
        tiles = _transform(self._bb.t(), d_taps)
        places = (shape[0], *self.tiles(shape[2], shape[3]), shape[1])
        return input_tiles_adjoint(tiles.view(t, t, 1, *places), self.geometry, shape)


class GeneratedPasses(Passes):
    """By generated code: on a CPU, in float32, without stride, dilation and groups."""

    def __init__(self, geometry: Geometry, exact: Transforms, isa: Isa) -> None:
        super().__init__(geometry, torch.float32)
        self._isa, self._step, self._taps = isa, exact.m, exact.t**2
        self._bt, self._b = exact.bt, _transposed(exact.bt)
        self._at, self._a = exact.at, _transposed(exact.at)
        self._padding = (geometry.padding[0][0], geometry.padding[1][0])

    def taps(self, x: Tensor, relu: bool) -> Tensor:
        return self._gathered(x, self._bt, self._padding, self.tiles(x.shape[2], x.shape[3]), relu)

    def product(self, taps: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(taps, weight, out=empty_taps(self._taps, taps.shape[1], weight.shape[2]))

    def image(self, product: Tensor, size: tuple[int, int, int], nhwc: bool) -> Tensor:
        n, h, w = size
        shape = (n, product.shape[2], self.geometry.out(h, 0), self.geometry.out(w, 1))
        # No view: autograd forbids in-place operators, such as a ReLU's, on views that a function of ours returns.
        y = torch.empty(shape, memory_format=torch.channels_last)
        tile_pass(self._code("scatter", self._at), y, product, (0, 0), self.tiles(h, w))
        return y

    def product_gradient(self, dy: Tensor, h: int, w: int) -> Tensor:
        return self._gathered(dy, self._a, (0, 0), self.tiles(h, w))

    def input_gradient(self, d_taps: Tensor, gate: Tensor | None, shape: torch.Size) -> Tensor:
        n, c, h, w = shape
        dx = d_taps.new_zeros(n, h, w, c).permute(0, 3, 1, 2)
        code = self._code("scatter", self._b, gate is not None)
        tile_pass(code, dx, d_taps, self._padding, self.tiles(h, w), gate)
        return dx

    def _gathered(
        self, image: Tensor, matrix: Matrix, padding: tuple[int, int], tiles: tuple[int, int], relu: bool = False
    ) -> Tensor:
        taps = empty_taps(self._taps, len(image) * tiles[0] * tiles[1], image.shape[1])
        tile_pass(self._code("gather", matrix, relu), channels_last(image), taps, padding, tiles)
        return taps

    def _code(self, kind: Literal["gather", "scatter"], matrix: Matrix, relu: bool = False) -> TilePass:
        return TilePass(self._isa, kind, matrix, self._step, relu)


def passes_for(
    x: Tensor, weight: Tensor, geometry: Geometry, aa: Tensor, bb: Tensor, exact: Transforms | None
) -> Passes:
    """The fastest that there are for x (N, C, H, W) and the weight (t t, C, K). `exact`: None where `aa` and `bb` are
    not the squares of exact transforms."""
    own = TorchPasses(geometry, aa, bb)
    if exact is None or bb.dtype != torch.float32 or x.device.type != "cpu" or observed(x):
        return own
    high, wide = own.tiles(x.shape[2], x.shape[3])
    if len(bb) * len(x) * high * wide * max(weight.shape[1:]) < _WORTH:
        return own
    isa = best_isa()
    return own if isa is None else GeneratedPasses(geometry, exact, isa)


def _transform(matrix: Tensor, taps: Tensor) -> Tensor:
    """(a, b) times (b, P, C) -> (a, P, C)."""
    return (matrix @ taps.flatten(1)).view(matrix.shape[0], *taps.shape[1:])


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))
