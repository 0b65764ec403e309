"""Two-dimensional convolution by Winograd's F(m, r), as t * t independent matrix products, with fake quantization.

    tiles D (t t, groups, P, C)   input V = BB D     weight U = GG W (t t, groups, C, K)   product M = V U
    output Y (m m, groups, P, K) = AA M

with P = images * tiles, C and K channels per group, and AA, GG, BB the Kronecker squares of A^T, G, B^T. For backward
only the input, the weight and small tensors are kept: all else is computed again.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016; the stages that are quantized,
from Fernandez-Marques et al., Searching for Winograd-aware Quantized Networks, MLSys 2020, arXiv 2002.10711.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tersenet.ops.fake_quantize import (
    Rounding,
    batch_range,
    joined_range,
    moving_range,
    round_to,
    round_to_,
    rounding_gradient,
    scale_of,
)
from tersenet.ops.winograd_tiles import (
    Geometry,
    input_tiles,
    input_tiles_adjoint,
    output_image,
    output_image_adjoint,
    padded_image,
    weight_taps,
    weight_taps_adjoint,
)

STAGES = ("input", "weight", "input_winograd", "weight_winograd", "product", "output")
"""What can be rounded, in the order of the arguments. Scales broadcast against x (N, C, H, W), the weight
(K, C / groups, kH, kW), V (t t, groups, P, C), U (t t, groups, C, K), M (t t, groups, P, K) and the output."""


@dataclass(frozen=True)
class Stage:
    """One tensor that is rounded. Its state is the scale, or with `observing` the range before this batch."""

    rounding: Rounding
    observing: Literal["no", "moving", "joined"] = "no"
    momentum: float = 0.01

    def settle(self, values: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale, and the range with this batch in it if that is observed."""
        if self.observing == "no":
            return state.to(values.dtype), None
        new = batch_range(values, self.rounding.shape).to(state.dtype)
        moved = joined_range(state, new) if self.observing == "joined" else moving_range(state, new, self.momentum)
        return scale_of(moved, self.rounding).to(values.dtype), moved


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


def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    matrices: Matrices,
    geometry: Geometry,
    stages: Stages | None = None,
    states: Sequence[Tensor | None] = (None,) * len(STAGES),
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The convolution of x (N, C, H, W), and the new range of each stage that observes.

    Computed in the matrices' type, under autocast too; the output has the type a convolution's would have.
    Every argument that is a float tensor gets a gradient, once: there is no second derivative.

    Raises: TersenetError if the padded map is smaller than the filter.
    """
    stages = stages or Stages()
    tensors = (x, weight, bias, *matrices, *states)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        outcome: tuple[Any, ...] = _Winograd.apply(geometry, stages, *tensors)  # pyright: ignore[reportAssignmentType]
        return outcome[0], outcome[1:]
    y, ranges, _ = _forward(geometry, stages, *tensors)
    return y, tuple(ranges)


def _forward(
    at: Geometry, stages: Stages, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor | None
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """The output, the new ranges and the scales that were used."""
    (aa, gg, bb), states = _matrices(rest), rest[3:]
    ranges: list[Tensor | None] = [None] * len(STAGES)
    scales: list[Tensor | None] = [None] * len(STAGES)

    def rounded(index: int, values: Tensor, own: bool = True) -> Tensor:
        stage, state = stages[index], states[index]
        if stage is None or state is None:
            return values
        scale, ranges[index] = stage.settle(values, state)
        scales[index] = scale
        return (round_to_ if own else round_to)(values, scale, stage.rounding)

    with _no_autocast(x):
        n, _, h, w = x.shape
        # Whoever gave NCHW gets NCHW.
        nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        tiles = input_tiles(padded_image(rounded(0, x.to(bb.dtype), own=False), at), at)
        v = rounded(2, transformed(bb, tiles))
        del tiles
        u = rounded(3, transformed(gg, weight_taps(rounded(1, weight.to(gg.dtype), own=False), at)))
        product = rounded(4, products(v, u))
        del v
        y = assembled(aa, product, bias, at, (n, h, w), nhwc)
        del product
        y = rounded(5, y)
    y = y.to(_output_type(x)).contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
    return y, ranges, scales


def _matrices(rest: Sequence[Tensor | None]) -> Matrices:
    aa, gg, bb = rest[:3]
    assert aa is not None
    assert gg is not None
    assert bb is not None
    return Matrices(aa, gg, bb)


def transformed(matrix: Tensor, taps: Tensor) -> Tensor:
    """(a, b) times (sqrt b, sqrt b, groups, ..., C) -> (a, groups, P, C)."""
    groups, channels = taps.shape[2], taps.shape[-1]
    return (matrix @ taps.reshape(matrix.shape[1], -1)).view(matrix.shape[0], groups, -1, channels)


def products(a: Tensor, b: Tensor) -> Tensor:
    """(t t, groups, i, j) times (t t, groups, j, k), each tap and group a matrix product of its own."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def assembled(
    aa: Tensor, product: Tensor, bias: Tensor | None, at: Geometry, size: tuple[int, int, int], nhwc: bool
) -> Tensor:
    """AA M, with the bias, as an image. `size` is the input's N, H, W."""
    n, h, w = size
    groups, channels = product.shape[1], product.shape[3]
    shape = at.tile, at.tile, groups, n * at.axis(0)[2] * at.axis(1)[2], at.tiles(h, 0), at.tiles(w, 1), channels
    y = (aa @ product.view(aa.shape[1], -1)).view(shape)
    y = output_image(y, at, size, nhwc)
    return y if bias is None else y.add_(bias.to(y.dtype).view(-1, 1, 1))


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    # Half precision would cost F(4, 3) two digits.
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)  # pyright: ignore[reportReturnType]


def _output_type(x: Tensor) -> torch.dtype:
    if x.dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, at: Geometry, stages: Stages, *tensors: Any) -> tuple[Any, ...]:
        x, weight, bias, *rest = tensors
        y, ranges, scales = _forward(at, stages, x, weight, bias, *rest)
        ctx.save_for_backward(x, weight, bias, *rest[:3], *scales)
        ctx.at, ctx.stages = at, stages
        ctx.mark_non_differentiable(*(found for found in ranges if found is not None))
        return (y, *ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with _no_autocast(gradients[0]):
            wanted = ctx.needs_input_grad[2:]
            return (None, None, *_backward(ctx.at, ctx.stages, gradients[0], wanted, *ctx.saved_tensors))


def _backward(
    at: Geometry, stages: Stages, dy: Tensor, wanted: Sequence[bool], x: Tensor, weight: Tensor, bias: Tensor | None,
    *rest: Tensor | None,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of all tensors of `_forward`. What is large is let go as soon as it is not needed."""
    (aa, gg, bb), scales = _matrices(rest), rest[3:]
    want_x, want_weight, want_bias, want_aa, want_gg, want_bb, *want_scale = wanted
    found: list[Tensor | None] = [None] * (6 + len(STAGES))
    n, _, h, w = x.shape

    def rounded(index: int, values: Tensor, own: bool = True) -> tuple[Tensor, Tensor | None]:
        """Rounded values, and the values before if the gradient reads them."""
        stage, scale = stages[index], scales[index]
        if stage is None or scale is None:
            return values, None
        if stage.rounding.reads_values:
            return round_to(values, scale, stage.rounding), values
        return (round_to_ if own else round_to)(values, scale, stage.rounding), None

    def through(index: int, values: Tensor | None, gradient: Tensor) -> Tensor:
        stage, scale = stages[index], scales[index]
        if stage is None or scale is None or values is None:
            return gradient
        gradient, of_scale = rounding_gradient(values, scale, stage.rounding, gradient)
        found[6 + index] = of_scale if want_scale[index] else None
        return gradient

    dy = dy.to(aa.dtype)
    x_rounded, x_raw = rounded(0, x.to(bb.dtype), own=False)
    image = padded_image(x_rounded, at)
    del x_rounded
    tiles = input_tiles(image, at)
    v, v_raw = rounded(2, transformed(bb, tiles))
    del tiles
    w_rounded, w_raw = rounded(1, weight.to(gg.dtype), own=False)
    taps = weight_taps(w_rounded, at)
    u, u_raw = rounded(3, transformed(gg, taps))

    # Output and product. Most settings need neither of them again: rounding passes the gradient on as it is.
    reads_y, reads_m = (stage is not None and stage.rounding.reads_values for stage in (stages.output, stages.product))
    m, m_raw = dy, None
    if want_aa or reads_y or reads_m:
        m, m_raw = rounded(4, products(v, u))
    if reads_y:
        dy = through(5, assembled(aa, m, bias, at, (n, h, w), nhwc=True), dy)
    if want_bias:
        found[2] = dy.sum((0, 2, 3))
    d_out = output_image_adjoint(dy, at, h, w).flatten(0, 1).flatten(1)
    if want_aa:
        found[3] = d_out @ m.reshape(m.shape[0], -1).t()
    del m
    d_product = (aa.t() @ d_out).view(aa.shape[1], at.groups, -1, u.shape[3])
    del d_out
    d_product = through(4, m_raw, d_product)
    del m_raw

    if want_weight or want_gg or want_scale[1] or want_scale[3]:
        d_u = through(3, u_raw, products(v.transpose(2, 3), d_product)).flatten(1)
        if want_gg:
            found[4] = d_u @ taps.reshape(gg.shape[1], -1).t()
        d_weight = weight_taps_adjoint((gg.t() @ d_u).view(taps.shape), at, weight.shape)
        d_weight = through(1, w_raw, d_weight)
        found[1] = d_weight.to(weight.dtype) if want_weight else None
    del v
    if want_x or want_bb or want_scale[0] or want_scale[2]:
        d_v = through(2, v_raw, products(d_product, u.transpose(2, 3))).flatten(1)
        del d_product, v_raw
        if want_bb:
            found[5] = d_v @ input_tiles(image, at).flatten(0, 1).flatten(1).t()
        del image
        if want_x or want_scale[0]:
            shape = _tiles_shape(at, x)
            d_tiles = (bb.t() @ d_v).view(shape)
            del d_v
            dx = through(0, x_raw, input_tiles_adjoint(d_tiles, at, x.shape))
            found[0] = dx.to(x.dtype) if want_x else None
    return found


def _tiles_shape(at: Geometry, x: Tensor) -> tuple[int, ...]:
    """The shape of the tiles of x."""
    t = at.tile + at.taps - 1
    n, c, h, w = x.shape
    (_, sh, dh), (_, sw, dw) = at.axis(0), at.axis(1)
    return t, t, at.groups, n * dh * dw, at.tiles(h, 0), at.tiles(w, 1), c // at.groups * sh * sw
