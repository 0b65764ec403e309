"""The gradients of `winograd.winograd_conv2d`: what forward did not keep is computed again, a few images at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tersenet.ops.fake_quantize import round_to, round_to_, rounding_gradient
from tersenet.ops.winograd_stages import (
    INPUT,
    INPUT_WINOGRAD,
    OUTPUT,
    PRODUCT,
    STAGES,
    WEIGHT,
    WEIGHT_WINOGRAD,
    Matrices,
    Stages,
    assembled,
    images_at_once,
    products,
    split,
    transformed,
)
from tersenet.ops.winograd_tiles import (
    Geometry,
    channels_last,
    copy_image,
    input_tiles,
    input_tiles_adjoint,
    output_image_adjoint,
    padded_image,
    weight_taps,
    weight_taps_adjoint,
)


class _Rounded:
    """Rounds what is computed again, and takes gradients back through it. `wanted`: which scales want one."""

    def __init__(self, stages: Stages, scales: Sequence[Tensor | None], wanted: Sequence[bool]) -> None:
        self.stages, self.scales, self.wanted = stages, scales, wanted
        self.gradients: list[Tensor | None] = [None] * len(STAGES)

    def reads(self, index: int) -> bool:
        """Whether the gradient reads the values before they were rounded."""
        stage = self.stages[index]
        return stage is not None and stage.rounding.reads_values

    def values(self, index: int, values: Tensor, own: bool = True) -> Tensor:
        """The values rounded; in place if they are ours and nobody reads them again."""
        stage, scale = self.stages[index], self.scales[index]
        if stage is None or scale is None:
            return values
        return (round_to_ if own and not self.reads(index) else round_to)(values, scale, stage.rounding)

    def through(self, index: int, values: Tensor, gradient: Tensor, share: float = 1.0, own: bool = False) -> Tensor:
        """The gradient for the values; that for their scale is added up.

        share: these values' of all that have the scale. own: both tensors may be overwritten.
        """
        stage, scale = self.stages[index], self.scales[index]
        if stage is None or scale is None:
            return gradient
        gradient, of_scale = rounding_gradient(values, scale, stage.rounding, gradient, own)
        if of_scale is not None and self.wanted[index]:
            # It was divided by the root of the number of values.
            of_scale = of_scale * math.sqrt(share)
            known = self.gradients[index]
            self.gradients[index] = of_scale if known is None else known + of_scale
        return gradient


def backward(
    geometry: Geometry, stages: Stages, dy: Tensor, wanted: Sequence[bool], x: Tensor, weight: Tensor,
    bias: Tensor | None, matrices: Matrices, scales: Sequence[Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of x, weight, bias, the matrices and the scales; None for what is not wanted."""
    aa, gg, bb = matrices
    want_x, want_weight, want_bias, want_aa, want_gg, want_bb, *want_scale = wanted
    rounded = _Rounded(stages, scales, want_scale)
    n, _, h, w = x.shape
    plain_weight = weight.to(gg.dtype)
    taps = weight_taps(rounded.values(WEIGHT, plain_weight, own=False), geometry)
    plain_u = transformed(gg, taps)
    u = rounded.values(WEIGHT_WINOGRAD, plain_u)

    want_u = want_weight or want_gg or want_scale[WEIGHT] or want_scale[WEIGHT_WINOGRAD]
    want_v = want_x or want_bb or want_scale[INPUT] or want_scale[INPUT_WINOGRAD]
    d_u = torch.zeros_like(u).flatten(0, 1) if want_u else None
    # Transposed: half the time.
    d_aa = torch.zeros_like(aa.t()) if want_aa else None
    d_bb = torch.zeros_like(bb) if want_bb else None
    d_bias = aa.new_zeros(weight.shape[0]) if want_bias else None
    dx = torch.empty_like(x) if want_x else None

    padded: Tensor | None = None
    at_once = images_at_once(x, weight, geometry)
    into = split(x if dx is None else dx, at_once)
    for images, d_out, dx_part in zip(split(x, at_once), split(dy, at_once), into, strict=True):
        size = images.shape[0], h, w
        share = 1.0 if at_once is None else size[0] / n
        padded = rounded.values(INPUT, padded_image(images.to(bb.dtype), geometry, padded))
        tiles = input_tiles(padded, geometry).contiguous()
        plain_v = transformed(bb, tiles)
        v = rounded.values(INPUT_WINOGRAD, plain_v)

        # Output and product. Most settings need neither of them again: rounding passes the gradient on as it is.
        d_out = d_out.to(aa.dtype)
        plain_m = m = None
        if want_aa or rounded.reads(PRODUCT) or rounded.reads(OUTPUT):
            plain_m = products(v, u)
            m = rounded.values(PRODUCT, plain_m)
        if m is not None and rounded.reads(OUTPUT):
            y = assembled(aa, m, bias, geometry, size, nhwc=True)
            d_out = rounded.through(OUTPUT, y, channels_last(d_out), share)
            del y
        if d_bias is not None:
            d_bias += d_out.sum((0, 2, 3))
        d_out = output_image_adjoint(d_out, geometry, h, w).flatten(0, 1).flatten(1)
        if d_aa is not None and m is not None:
            d_aa.addmm_(m.view(m.shape[0], -1), d_out.t())
        del m
        d_m = (aa.t() @ d_out).view(aa.shape[1], geometry.groups, -1, u.shape[3])
        del d_out
        if plain_m is not None and rounded.reads(PRODUCT):
            d_m = rounded.through(PRODUCT, plain_m, d_m, share, own=True)
        del plain_m

        if d_u is not None:
            d_u.baddbmm_(v.flatten(0, 1).transpose(1, 2), d_m.flatten(0, 1))
        del v
        if not want_v:
            continue
        d_v = products(d_m, u.transpose(2, 3))
        del d_m
        if rounded.reads(INPUT_WINOGRAD):
            d_v = rounded.through(INPUT_WINOGRAD, plain_v, d_v, share, own=True)
        d_v = d_v.flatten(1)
        del plain_v
        if d_bb is not None:
            d_bb.addmm_(d_v, tiles.flatten(0, 1).flatten(1).t())
        if want_x or want_scale[INPUT]:
            d_tiles = (bb.t() @ d_v).view(tiles.shape)
            d_image = input_tiles_adjoint(d_tiles, geometry, images.shape)
            del d_tiles
            if rounded.reads(INPUT):
                d_image = rounded.through(INPUT, channels_last(images.to(bb.dtype)), d_image, share)
            if dx is not None:
                copy_image(d_image, dx_part)
        del tiles, d_v

    d_gg = d_weight = None
    if d_u is not None:
        d_u = d_u.view(u.shape)
        if rounded.reads(WEIGHT_WINOGRAD):
            d_u = rounded.through(WEIGHT_WINOGRAD, plain_u, d_u, own=True)
        d_u = d_u.flatten(1)
        if want_gg:
            d_gg = d_u @ taps.reshape(gg.shape[1], -1).t()
        d_weight = weight_taps_adjoint((gg.t() @ d_u).view(taps.shape), geometry, weight.shape)
        if rounded.reads(WEIGHT):
            d_weight = rounded.through(WEIGHT, plain_weight, d_weight)
        d_weight = d_weight.to(weight.dtype) if want_weight else None
    return [dx, d_weight, d_bias, None if d_aa is None else d_aa.t(), d_gg, d_bb, *rounded.gradients]
