"""Convolution whose weight lives in the Winograd domain, with the ReLU there too, or partly, or nowhere.

    tiles D (t t, P, C)   Z = BB D   V = share BB relu(D) + (1 - share) relu(Z)   product M = V W   output Y = AA M

with the weight W (t t, C, K) free: t t numbers for each pair of channels, none of a spatial filter. `share` 0 is the
paper's layer, `share` 1 an ordinary ReLU before a Winograd convolution; without a ReLU V is Z. For backward only the
input, the weight and its mask are kept: all else is computed again.

Source: Liu et al., Efficient Sparse-Winograd Convolutional Neural Networks, ICLR 2018, equation 2 and its gradients.
Differs: any tile, any map size and padding; the mixture with the spatial ReLU is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tersenet.ops.winograd_tiles import (
    Geometry,
    input_tiles,
    input_tiles_adjoint,
    output_image,
    output_image_adjoint,
    padded_image,
)

_CACHED = 2**19
"""Numbers of one transient tensor that are worth computing at once on a CPU."""


class Activation(NamedTuple):
    """What comes between the image and the product. `share` of the spatial ReLU, the rest is the Winograd domain's."""

    relu: bool = True
    share: float = 0.0


def winograd_relu_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    aa: Tensor,
    bb: Tensor,
    geometry: Geometry,
    activation: Activation,
) -> Tensor:
    """x (N, C, H, W), weight (t t, C, K), mask of the weight's shape, bias (K,) -> (N, K, H', W').

    `aa` (m m, t t) and `bb` (t t, t t) are the Kronecker squares of A^T and B^T; all is computed in their type. Masked
    weights count as zero and get no gradient. x, weight and bias get gradients, once.

    Raises: TersenetError if the padded map is smaller than the filter.
    """
    tensors = (x, weight, mask, bias, aa, bb)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        made: Any = _WinogradReLU.apply(geometry, activation, *tensors)
        return made
    return _forward(geometry, activation, *tensors)


def transformed_input(x: Tensor, bb: Tensor, geometry: Geometry, activation: Activation) -> Tensor:
    """V (t t, P, C) of x (N, C, H, W): what meets the weight. P counts images and tiles."""
    tiles = _tiles(padded_image(x.to(bb.dtype), geometry), geometry)
    return _activated(tiles, bb, activation)


def _forward(
    geometry: Geometry, act: Activation, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None,
    aa: Tensor, bb: Tensor,
) -> Tensor:  # fmt: skip
    weight = _masked(weight, mask).to(bb.dtype)
    parts = [_part(geometry, act, images, weight, bias, aa, bb) for images in _chunks(x, weight, geometry)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _part(
    geometry: Geometry, act: Activation, x: Tensor, weight: Tensor, bias: Tensor | None, aa: Tensor, bb: Tensor
) -> Tensor:
    n, _, h, w = x.shape
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    product = torch.bmm(transformed_input(x, bb, geometry, act), weight)
    y = _transform(aa, product)
    y = y.view(geometry.tile, geometry.tile, 1, n, geometry.tiles(h, 0), geometry.tiles(w, 1), weight.shape[2])
    y = output_image(y, geometry, (n, h, w), nhwc)
    if bias is not None:
        y = y.add_(bias.to(y.dtype).view(-1, 1, 1))
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)


def _chunks(x: Tensor, weight: Tensor, geometry: Geometry) -> Sequence[Tensor]:
    """Images a few at a time: what is transient then stays in the cache, which takes two thirds of the time."""
    # While a graph is exported, the batch may be of any size.
    if not isinstance(x.shape[0], int) or x.is_meta:  # pyright: ignore[reportUnnecessaryIsInstance]
        return (x,)
    one = weight.shape[0] * geometry.tiles(x.shape[2], 0) * geometry.tiles(x.shape[3], 1) * max(weight.shape[1:])
    return x.split(max(1, (_CACHED if x.device.type == "cpu" else _CACHED * 256) // one))


def _tiles(image: Tensor, geometry: Geometry) -> Tensor:
    """(t t, P, C)"""
    tiles = input_tiles(image, geometry)
    return tiles.reshape(tiles.shape[0] * tiles.shape[1], -1, tiles.shape[-1])


def _transform(matrix: Tensor, taps: Tensor) -> Tensor:
    """(a, b) times (b, P, C) -> (a, P, C)."""
    return (matrix @ taps.flatten(1)).view(matrix.shape[0], *taps.shape[1:])


def _activated(tiles: Tensor, bb: Tensor, act: Activation) -> Tensor:
    if not act.relu:
        return _transform(bb, tiles)
    if act.share == 1:
        return _transform(bb, tiles.clamp(min=0))
    v = _transform(bb, tiles).clamp_(min=0)
    if act.share == 0:
        return v
    return v.mul_(1 - act.share).add_(_transform(bb, tiles.clamp(min=0)), alpha=act.share)


def _masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Not a product, which would turn NaN and the sign of zero into other numbers than those of a loaded file."""
    return weight if mask is None else weight.masked_fill(~mask, 0)


class _WinogradReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry: Geometry, act: Activation, *tensors: Any) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.geometry, ctx.act = geometry, act
        return _forward(geometry, act, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        geometry: Geometry = ctx.geometry
        act: Activation = ctx.act
        x, weight, mask, bias, aa, bb = ctx.saved_tensors
        want_x, want_weight, _, want_bias = ctx.needs_input_grad[2:6]
        dy: Tensor = gradients[0]
        d_bias = dy.to(aa.dtype).sum((0, 2, 3)).to(bias.dtype) if want_bias else None
        masked = _masked(weight, mask).to(bb.dtype)
        d_weight = torch.zeros_like(masked) if want_weight else None
        dx: list[Tensor] = []
        chunks = _chunks(x, weight, geometry)
        for images, dy_part in zip(chunks, dy.split(len(chunks[0])), strict=True):
            d_part = _backward(geometry, act, images, dy_part, masked, aa, bb, d_weight, want_x)
            if d_part is not None:
                dx.append(d_part)
        if d_weight is not None:
            d_weight = _masked(d_weight, mask).to(weight.dtype)
        return None, None, torch.cat(dx) if want_x else None, d_weight, None, d_bias, None, None


def _backward(
    geometry: Geometry, act: Activation, x: Tensor, dy: Tensor, weight: Tensor, aa: Tensor, bb: Tensor,
    d_weight: Tensor | None, want_x: bool,
) -> Tensor | None:  # fmt: skip
    """The gradient of some images, if it is wanted; that of the weight is added to `d_weight`."""
    d_out = output_image_adjoint(dy.to(aa.dtype), geometry, x.shape[2], x.shape[3]).flatten(0, 1).flatten(1)
    d_product = (aa.t() @ d_out).view(aa.shape[1], -1, weight.shape[2])
    del d_out
    tiles = _tiles(padded_image(x.to(bb.dtype), geometry), geometry)
    v = None
    if d_weight is not None:
        v = _activated(tiles, bb, act)
        d_weight.baddbmm_(v.transpose(1, 2), d_product)
    if not want_x:
        return None
    d_v = torch.bmm(d_product, weight.transpose(1, 2))
    del d_product
    d_tiles = _activation_adjoint(d_v, tiles, v, bb, act)
    t = geometry.tile + geometry.taps - 1
    shape = (t, t, 1, len(x), geometry.tiles(x.shape[2], 0), geometry.tiles(x.shape[3], 1), x.shape[1])
    return input_tiles_adjoint(d_tiles.view(shape), geometry, x.shape).to(x.dtype)


def _activation_adjoint(d_v: Tensor, tiles: Tensor, v: Tensor | None, bb: Tensor, act: Activation) -> Tensor:
    """The gradient of the tiles (t t, P, C) from that of V. `v` is V, if it is there."""
    if not act.relu:
        return _transform(bb.t(), d_v)
    spatial = _where_positive(_transform(bb.t(), d_v), tiles) if act.share > 0 else None
    if spatial is not None and act.share == 1:
        return spatial
    # V without a spatial part is positive where Z is.
    z = v if v is not None and act.share == 0 else _transform(bb, tiles)
    d_tiles = _transform(bb.t(), _where_positive(d_v, z))
    return d_tiles if spatial is None else d_tiles.mul_(1 - act.share).add_(spatial, alpha=act.share)


def _where_positive(gradient: Tensor, values: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(gradient, values, 0)
