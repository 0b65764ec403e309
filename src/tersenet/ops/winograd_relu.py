"""Convolution whose weight lives in the Winograd domain, with the ReLU there too, or partly, or nowhere.

    tiles D (t t, P, C)   Z = BB D   V = share BB relu(D) + (1 - share) relu(Z)   product M = V W   output Y = AA M

with the weight W (t t, C, K) free: t t numbers for each pair of channels, none of a spatial filter. `share` 0 is the
paper's layer, `share` 1 an ordinary ReLU before a Winograd convolution; without a ReLU V is Z, or what of Z is further
than a threshold from zero. For backward only the input, the weight and its mask are kept: all else is computed again.

Source: Liu et al., Efficient Sparse-Winograd Convolutional Neural Networks, ICLR 2018, equation 2 and its gradients.
Differs: any tile, any map size and padding; the mixture with the spatial ReLU and the threshold are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import hardshrink

from tersenet.ops.cook_toom import Transforms
from tersenet.ops.winograd_passes import Passes, TorchPasses, passes_for
from tersenet.ops.winograd_tiles import Geometry, copy_image


class Activation(NamedTuple):
    """What comes between the image and the product. `share` of the spatial ReLU, the rest is the Winograd domain's.
    `threshold`: without a ReLU, what is no further from zero than this is zero; gradients of the input know nothing of
    it."""

    relu: bool = True
    share: float = 0.0
    threshold: float = 0.0


def winograd_relu_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    aa: Tensor,
    bb: Tensor,
    geometry: Geometry,
    activation: Activation,
    exact: Transforms | None = None,
) -> Tensor:
    """x (N, C, H, W), weight (t t, C, K), mask of the weight's shape, bias (K,) -> (N, K, H', W').

    `aa` (m m, t t) and `bb` (t t, t t) are the Kronecker squares of A^T and B^T; all is computed in their type. Masked
    weights count as zero and get no gradient. x, weight and bias get gradients, once. `exact`: the transforms that the
    squares are rounded from; generated code may take their place.

    Raises: TersenetError if the padded map is smaller than the filter.
    """
    passes = passes_for(x, weight, geometry, aa, bb, exact)
    tensors = (x, weight, mask, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        made: Any = _WinogradReLU.apply(passes, activation, *tensors)
        return made
    return _forward(passes, activation, *tensors)


def transformed_input(x: Tensor, bb: Tensor, geometry: Geometry, activation: Activation) -> Tensor:
    """V (t t, P, C) of x (N, C, H, W): what meets the weight. P counts images and tiles."""
    return _activated(TorchPasses(geometry, bb, bb), x.to(bb.dtype), activation)[0]


def _forward(
    passes: Passes, act: Activation, x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    weight = _masked(weight, mask).to(passes.dtype)
    chunks = passes.chunks(x, weight)
    if len(chunks) == 1:
        return _part(passes, act, x, weight, bias).to(x.dtype).contiguous(memory_format=_order(x))
    return _joined(x, (_part(passes, act, images, weight, bias) for images in chunks))


def _part(passes: Passes, act: Activation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In either memory order."""
    n, _, h, w = x.shape
    v, _ = _activated(passes, x.to(passes.dtype), act)
    y = passes.image(passes.product(v, weight), (n, h, w), _order(x) == torch.channels_last)
    return y if bias is None else y.add_(bias.to(y.dtype).view(-1, 1, 1))


def _joined(like: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """Images in one tensor of the type and memory order of `like`, which has as many."""
    made: Tensor | None = None
    first = 0
    for part in parts:
        if made is None:
            shape = (len(like), *part.shape[1:])
            made = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=_order(like))
        copy_image(part.to(made.dtype), made[first : first + len(part)])
        first += len(part)
    assert made is not None
    return made


def _order(x: Tensor) -> torch.memory_format:
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def _activated(passes: Passes, x: Tensor, act: Activation) -> tuple[Tensor, Tensor | None]:
    """V, and where it is cut off by a ReLU of its own the taps whose sign tells that."""
    if not act.relu:
        v = passes.taps(x, False)
        # The input's gradient goes past it: one that stops where V is zero does not train networks from random weights.
        return hardshrink(v, act.threshold) if act.threshold else v, None
    if act.share == 1:
        return passes.taps(x.clamp(min=0), False), None
    gate = passes.taps(x, True)
    if act.share == 0:
        return gate, gate
    return passes.taps(x.clamp(min=0), False).mul_(act.share).add_(gate, alpha=1 - act.share), gate


def _masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """Not a product, which would turn NaN and the sign of zero into other numbers than those of a loaded file."""
    return weight if mask is None else weight.masked_fill(~mask, 0)


class _WinogradReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, passes: Passes, act: Activation, *tensors: Any) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.passes, ctx.act = passes, act
        return _forward(passes, act, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        passes: Passes = ctx.passes
        x, weight, mask, bias = ctx.saved_tensors
        want_x, want_weight, _, want_bias = ctx.needs_input_grad[2:6]
        dy: Tensor = gradients[0]
        d_bias = dy.to(passes.dtype).sum((0, 2, 3)).to(bias.dtype) if want_bias else None
        masked = _masked(weight, mask).to(passes.dtype)
        d_weight = torch.zeros_like(masked) if want_weight else None
        dx = torch.empty_like(x) if want_x else None
        chunks = passes.chunks(x, weight)
        at_once = len(chunks[0])
        into = (x if dx is None else dx).split(at_once)
        for images, d_part, dx_part in zip(chunks, dy.split(at_once), into, strict=True):
            found = _backward(passes, ctx.act, images, d_part, masked, d_weight, want_x)
            if found is not None:
                copy_image(found, dx_part)
        if d_weight is not None:
            d_weight = _masked(d_weight, mask).to(weight.dtype)
        return None, None, dx, d_weight, None, d_bias


def _backward(
    passes: Passes, act: Activation, x: Tensor, dy: Tensor, weight: Tensor, d_weight: Tensor | None, want_x: bool
) -> Tensor | None:
    """The gradient of some images, if it is wanted; that of the weight is added to `d_weight`."""
    x = x.to(passes.dtype)
    d_product = passes.product_gradient(dy.to(passes.dtype), x.shape[2], x.shape[3])
    gate = None
    if d_weight is not None or (act.relu and act.share < 1):
        v, gate = _activated(passes, x, act)
        if d_weight is not None:
            d_weight.baddbmm_(v.transpose(1, 2), d_product)
        del v
    if not want_x:
        return None
    d_v = passes.product(d_product, weight.transpose(1, 2))
    del d_product
    if not act.relu or act.share == 0:
        return passes.input_gradient(d_v, gate, x.shape)
    spatial = torch.ops.aten.threshold_backward(passes.input_gradient(d_v, None, x.shape), x, 0)
    if gate is None:
        return spatial
    return passes.input_gradient(d_v, gate, x.shape).mul_(1 - act.share).add_(spatial, alpha=act.share)
