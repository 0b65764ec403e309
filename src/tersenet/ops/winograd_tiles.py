"""How an image is cut into the overlapping tiles of Winograd's F(m, r), and put together again; and the adjoints.

Any size, padding, stride and dilation: a stride s becomes s * s phases of the image beside each other as channels, a
dilation d becomes d * d phases as images. Channels are innermost throughout: the copies run along them.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016; strides as in wincnn and in Huang
et al., DWM, arXiv 2002.00552.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from tersenet.errors import TersenetError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """What a convolution does to a map, apart from its numbers. Pairs are (height, width).

    tile: m, the outputs of one tile along an axis.
    kernel: Taps of the filter along each axis.
    padding: Zeros (before, after) the rows and the columns.
    """

    tile: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def taps(self) -> int:
        """r of the transforms: what is left of the larger side of the kernel in one phase of the stride."""
        return max(-(-self._spread(axis) // self.axis(axis)[1]) for axis in (0, 1))

    def axis(self, axis: int) -> tuple[int, int, int]:
        """(every so many rows are read at all, stride, dilation); one of the last two is 1.

        Dilated filters that are also strided have zeros put between their taps, unless the two have a common divisor.
        """
        stride, dilation = self.stride[axis], self.dilation[axis]
        step = gcd(stride, dilation)
        stride, dilation = stride // step, dilation // step
        return step, stride, 1 if stride > 1 else dilation

    def spacing(self, axis: int) -> int:
        """How far apart the taps are after `axis` has taken what it can."""
        step, stride, _ = self.axis(axis)
        return self.dilation[axis] // step if stride > 1 else 1

    def _spread(self, axis: int) -> int:
        return self.spacing(axis) * (self.kernel[axis] - 1) + 1

    def out(self, size: int, axis: int) -> int:
        """Rows or columns of the output. Raises: TersenetError if there are none."""
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        padded = size + sum(self.padding[axis])
        if padded < reach:
            raise TersenetError(
                f"a padded map of {padded} {('rows', 'columns')[axis]} is smaller than the filter's reach ({reach})"
            )
        return (padded - reach) // self.stride[axis] + 1

    def tiles(self, size: int, axis: int) -> int:
        """Tiles along the axis, in one phase of the dilation."""
        return -(-self.out(size, axis) // (self.axis(axis)[2] * self.tile))


def padded_image(x: Tensor, geometry: Geometry, into: Tensor | None = None) -> Tensor:
    """(N, C, H, W) -> (N, C, rows, columns) in channels_last order: exactly what the tiles reach.

    `into`: what this made of as many other images or more, which is overwritten. Its borders must still be zero.
    """
    n, c, h, w = x.shape
    (top, _), (left, _) = geometry.padding
    shape = n, reach(geometry, h, 0), reach(geometry, w, 1), c
    out = x.new_zeros(shape).permute(0, 3, 1, 2) if into is None else into[:n]
    # Rows that a stride never reads are left out.
    h, w = min(h, out.shape[2] - top), min(w, out.shape[3] - left)
    out[:, :, top : top + h, left : left + w] = channels_last(x[:, :, :h, :w])
    return out


def channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) in that order of memory."""
    if not _is_fast(x) or not x.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    return _transposed(x, c).view(n, h, w, c).permute(0, 3, 1, 2)


def copy_image(image: Tensor, into: Tensor) -> None:
    """image -> into, both (N, C, H, W), whatever their orders of memory."""
    if _is_fast(image) and image.stride(1) == 1 and into.is_contiguous():
        image = image.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        image = _transposed(image, image.shape[1] * image.shape[2]).view(into.shape)
    into.copy_(image)


def _is_fast(x: Tensor) -> bool:
    """Whether `_transposed` is faster than a copy. Compilers know by themselves how to transpose."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _transposed(x: Tensor, rows: int) -> Tensor:
    """N matrices of so many rows -> their transposes, as (N, numbers, 1, 1). x is contiguous.

    A shuffle of the channels of one pixel: four times as fast as a copy, since torch has vector code for it.
    """
    return torch.channel_shuffle(x.flatten(1)[:, None, None].permute(0, 3, 1, 2), rows)


def reach(geometry: Geometry, size: int, axis: int) -> int:
    """Rows or columns that the tiles read, padding included."""
    step, stride, dilation = geometry.axis(axis)
    return (geometry.tile * geometry.tiles(size, axis) + geometry.taps - 1) * stride * dilation * step


def input_tiles(x: Tensor, geometry: Geometry) -> Tensor:
    """`padded_image` -> (t, t, groups, N', tiles, tiles, C'): overlapping tiles.

    N' has the phases of the dilation, C' of one group those of the stride.
    """
    t = geometry.tile + geometry.taps - 1
    (step_h, sh, dh), (step_w, sw, dw) = geometry.axis(0), geometry.axis(1)
    if step_h > 1 or step_w > 1:
        x = x[:, :, ::step_h, ::step_w]
    n, c, h, w = x.shape
    x = x.unflatten(1, (geometry.groups, c // geometry.groups)).unflatten(4, (w // (sw * dw), sw, dw))
    x = x.unflatten(3, (h // (sh * dh), sh, dh))
    # n, g, c, rows, sh, dh, columns, sw, dw -> ... with the taps of each tile at the end.
    x = x.unfold(3, t, geometry.tile).unfold(6, t, geometry.tile)
    x = x.permute(9, 10, 1, 0, 5, 8, 3, 6, 2, 4, 7)
    return x.reshape(t, t, geometry.groups, n * dh * dw, x.shape[6], x.shape[7], c // geometry.groups * sh * sw)


def input_tiles_adjoint(tiles: Tensor, geometry: Geometry, shape: torch.Size) -> Tensor:
    """The gradient of `padded_image` and `input_tiles`: overlapping values are added. `shape` is the image's."""
    n, c, h, w = shape
    (step_h, sh, dh), (step_w, sw, dw) = geometry.axis(0), geometry.axis(1)
    m, t, groups = geometry.tile, tiles.shape[0], geometry.groups
    rows, columns = tiles.shape[4:6]
    tiles = tiles.view(t, t, groups, n, dh, dw, rows, columns, c // groups, sh, sw)
    # -> n, (rows, t, sh, dh), (columns, t, sw, dw), (g, c)
    tiles = tiles.permute(3, 6, 0, 9, 4, 7, 1, 10, 5, 2, 8)
    # Tiles start every m rows and reach into this many of such blocks.
    blocks = -(-t // m)
    height, width = rows + blocks - 1, columns + blocks - 1
    image = tiles.new_empty(n, height, m, sh, dh, width, m, sw, dw, groups, c // groups)
    image[:, :rows, :, :, :, :columns] = tiles[:, :, :m, :, :, :, :m]
    image[:, rows:] = 0
    image[:, :rows, :, :, :, columns:] = 0
    for i in range(blocks):
        for j in range(0 if i else 1, blocks):
            part = tiles[:, :, i * m : (i + 1) * m, :, :, :, j * m : (j + 1) * m]
            image[:, i : i + rows, : part.shape[2], :, :, j : j + columns, : part.shape[6]] += part
    x = image.view(n, height * m * sh * dh, width * m * sw * dw, c).permute(0, 3, 1, 2)
    for axis, step in ((0, step_h), (1, step_w)):
        if step > 1:
            spread = x.new_zeros(*x.shape[: 2 + axis], x.shape[2 + axis] * step, *x.shape[3 + axis :])
            (spread[:, :, ::step] if axis == 0 else spread[:, :, :, ::step]).copy_(x)
            x = spread
    (top, _), (left, _) = geometry.padding
    below, right = top + h - x.shape[2], left + w - x.shape[3]
    x = x[:, :, top : top + h, left : left + w]
    # Rows that a stride never reads have no gradient.
    return pad(x, (0, max(0, right), 0, max(0, below))) if max(right, below) > 0 else x


def weight_taps(weight: Tensor, geometry: Geometry) -> Tensor:
    """(K, C / groups, kH, kW) -> (r, r, groups, C', K / groups), with the phases of the stride in C'."""
    r = geometry.taps
    strides = [geometry.axis(axis)[1] for axis in (0, 1)]
    weight = _spaced(weight, geometry)
    weight = pad(weight, (0, r * strides[1] - weight.shape[3], 0, r * strides[0] - weight.shape[2]))
    weight = weight.unflatten(3, (r, strides[1])).unflatten(2, (r, strides[0])).unflatten(0, (geometry.groups, -1))
    # g, k, c, r, sh, r, sw
    return weight.permute(3, 5, 0, 2, 4, 6, 1).reshape(r, r, geometry.groups, -1, weight.shape[1])


def weight_taps_adjoint(taps: Tensor, geometry: Geometry, shape: torch.Size) -> Tensor:
    """The gradient of `weight_taps`; `shape` is the weight's."""
    r = geometry.taps
    sh, sw = (geometry.axis(axis)[1] for axis in (0, 1))
    weight = taps.view(r, r, geometry.groups, shape[1], sh, sw, -1).permute(2, 6, 3, 0, 4, 1, 5)
    weight = weight.reshape(shape[0], shape[1], r * sh, r * sw)
    steps = geometry.spacing(0), geometry.spacing(1)
    return weight[:, :, : steps[0] * shape[2] : steps[0], : steps[1] * shape[3] : steps[1]][..., : shape[2], : shape[3]]


def _spaced(weight: Tensor, geometry: Geometry) -> Tensor:
    steps = geometry.spacing(0), geometry.spacing(1)
    if steps == (1, 1):
        return weight
    k, c, h, w = weight.shape
    spread = weight.new_zeros(k, c, steps[0] * (h - 1) + 1, steps[1] * (w - 1) + 1)
    spread[:, :, :: steps[0], :: steps[1]] = weight
    return spread


def output_image(tiles: Tensor, geometry: Geometry, size: tuple[int, int, int], channels_last: bool) -> Tensor:
    """(m, m, groups, N', tiles, tiles, K') -> (N, K, H', W'). `size` is the input's N, H, W.

    Never a view of another tensor where nothing is cropped: autograd forbids in-place operators, such as a ReLU's, on
    views that a function of ours returns. What is cropped has to be copied by the caller.
    """
    n, h, w = size
    dh, dw = geometry.axis(0)[2], geometry.axis(1)[2]
    rows, columns = tiles.shape[4] * geometry.tile * dh, tiles.shape[5] * geometry.tile * dw
    channels = geometry.groups * tiles.shape[6]
    y = tiles.unflatten(3, (n, dh, dw))
    # m, m, g, n, dh, dw, rows, columns, k -> (rows, m, dh), (columns, m, dw) and (g, k)
    if channels_last:
        y = y.permute(3, 6, 0, 4, 7, 1, 5, 2, 8)
        order = torch.channels_last
        image = torch.empty(n, channels, rows, columns, dtype=y.dtype, device=y.device, memory_format=order)
        image.permute(0, 2, 3, 1).view(y.shape).copy_(y)
    else:
        image = y.permute(3, 2, 8, 6, 0, 4, 7, 1, 5).reshape(n, channels, rows, columns)
    height, width = geometry.out(h, 0), geometry.out(w, 1)
    return image if (height, width) == (rows, columns) else image[:, :, :height, :width]


def output_image_adjoint(y: Tensor, geometry: Geometry, h: int, w: int) -> Tensor:
    """The gradient of `output_image`: (N, K, H', W') cut into tiles."""
    dh, dw = geometry.axis(0)[2], geometry.axis(1)[2]
    rows, columns = geometry.tiles(h, 0), geometry.tiles(w, 1)
    n, k = y.shape[:2]
    edges = (0, columns * geometry.tile * dw - y.shape[3], 0, rows * geometry.tile * dh - y.shape[2])
    y = channels_last(y)
    y = (pad(y, edges) if any(edges) else y).permute(0, 2, 3, 1)
    y = y.unflatten(3, (geometry.groups, k // geometry.groups)).unflatten(2, (columns, geometry.tile, dw))
    y = y.unflatten(1, (rows, geometry.tile, dh))
    # n, rows, m, dh, columns, m, dw, g, k
    y = y.permute(2, 5, 7, 0, 3, 6, 1, 4, 8)
    return y.reshape(geometry.tile, geometry.tile, geometry.groups, n * dh * dw, rows, columns, k // geometry.groups)
