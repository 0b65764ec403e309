"""Shapes of results without torch: on `meta` it takes ten times as long, and a network has hundreds of operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_CONVOLUTION = _aten.convolution.default
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1}
PRODUCTS = frozenset([_CONVOLUTION, *_PRODUCTS])
"""Operators that take nearly all of a network's time."""
_UNARY = frozenset("relu hardtanh leaky_relu elu silu gelu mish sigmoid tanh hardswish hardsigmoid _softmax".split())
_BINARY = frozenset("add sub mul div".split())


def product_shape(func: Any, args: Any) -> tuple[int, ...] | None:
    """What one of `PRODUCTS` makes of its arguments, in plain memory order. None where torch has to tell: another
    memory order, or sizes that don't fit."""
    if func is _CONVOLUTION:
        return _convolved(*args)
    first = _PRODUCTS[func]
    a, b = args[first].shape, args[first + 1].shape
    return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] else None


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> tuple[int, ...] | None:
    size, kernel = x.shape, weight.shape
    axes = len(size) - 2
    if transposed or axes < 1 or len(kernel) != axes + 2 or size[1] != kernel[1] * groups or kernel[0] % groups:
        return None
    if not x.is_contiguous() or (bias is not None and tuple(bias.shape) != (kernel[0],)):
        return None
    spatial: list[int] = []
    for axis in range(axes):
        # One number stands for all axes.
        step, around, gap = (part[axis] if len(part) == axes else part[0] for part in (stride, padding, dilation))
        spatial.append((size[axis + 2] + 2 * around - gap * (kernel[axis + 2] - 1) - 1) // step + 1)
    return (size[0], kernel[0], *spatial) if min(spatial) > 0 else None


def on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator on `meta`: where torch would take many small steps, a tensor of the shape it must have.
    """
    first = args[0] if args else None
    if func in PRODUCTS:
        shape = product_shape(func, args)
        return func(*args, **kwargs) if shape is None else _empty(shape, args[0])
    if not isinstance(first, Tensor) or not first.is_floating_point() or not first.is_contiguous():
        return func(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    if name == "native_batch_norm" and not args[5]:
        return _empty(first.shape, first), _empty((0,), first), _empty((0,), first)
    second = args[1] if len(args) > 1 else None
    alike = isinstance(second, (int, float)) or (isinstance(second, Tensor) and second.shape == first.shape)
    if name in _UNARY or (name in _BINARY and alike):
        return _empty(first.shape, first)
    if name[-1] == "_" and (name[:-1] in _UNARY or (name[:-1] in _BINARY and alike)):
        return first
    return func(*args, **kwargs)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.empty(shape, device="meta", dtype=like.dtype)
