"""Shapes of results without torch: on `meta` it takes ten times as long, and a network has hundreds of operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

_aten = torch.ops.aten
_CONVOLUTION = _aten.convolution.default
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1}
PRODUCTS = frozenset([_CONVOLUTION, *_PRODUCTS])
"""Operators that take nearly all of a network's time."""
_UNARY = frozenset("relu hardtanh leaky_relu elu silu gelu mish sigmoid tanh hardswish hardsigmoid _softmax".split())
_BINARY = frozenset("add sub mul div".split())


def empty_product(func: Any, args: Any) -> Tensor | None:
    """A tensor such as one of `PRODUCTS` makes of its arguments, without values: of its shape, in its memory order, on
    its device. None where torch has to tell: sizes that don't fit, or a transposed convolution."""
    if func is _CONVOLUTION:
        x, weight = args[:2]
        shape = _convolved(*args)
        # As the kernels do: where one of the two has channels last, so has the result.
        order = suggest_memory_format(x)
        order = suggest_memory_format(weight) if order is torch.contiguous_format else order
    else:
        x, weight = args[_PRODUCTS[func] :][:2]
        fit = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0]
        shape, order = (x.shape[0], weight.shape[1]) if fit else None, torch.contiguous_format
    return None if shape is None else torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)


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
    if bias is not None and tuple(bias.shape) != (kernel[0],):
        return None
    spatial: list[int] = []
    for axis in range(axes):
        # One number stands for all axes.
        step, around, gap = (part[axis] if len(part) == axes else part[0] for part in (stride, padding, dilation))
        spatial.append((size[axis + 2] + 2 * around - gap * (kernel[axis + 2] - 1) - 1) // step + 1)
    return (size[0], kernel[0], *spatial) if min(spatial) > 0 else None


def on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator on `meta`: where torch takes many small steps, an empty tensor of the right shape."""
    first = args[0] if args else None
    if func in PRODUCTS:
        made = empty_product(func, args)
        return func(*args, **kwargs) if made is None else made
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return func(*args, **kwargs)
    order = suggest_memory_format(first)
    if not first.is_contiguous(memory_format=order):
        return func(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    if name == "native_batch_norm" and not args[5]:
        return _empty(first.shape, first, order), _empty((0,), first), _empty((0,), first)
    second = args[1] if len(args) > 1 else None
    alike = isinstance(second, (int, float)) or (isinstance(second, Tensor) and second.shape == first.shape)
    if name in _UNARY or (name in _BINARY and alike):
        return _empty(first.shape, first, order)
    if name[-1] == "_" and (name[:-1] in _UNARY or (name[:-1] in _BINARY and alike)):
        return first
    return func(*args, **kwargs)


def _empty(shape: tuple[int, ...], like: Tensor, order: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(shape, device="meta", dtype=like.dtype, memory_format=order)
