"""Sizes of operators' results, for the operators that make up most networks.

torch knows them all, but to work one out it loads parts that nothing else needs: a second and more in a fresh process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., "Tensor | None"]

_UNARY = (
    "abs clamp clamp_max clamp_min elu exp gelu hardsigmoid hardswish hardtanh leaky_relu mish neg relu relu6 rsqrt "
    "sigmoid silu softplus sqrt square tanh"
).split()
_BINARY = "add sub mul div".split()


def result_of(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    """What an operator makes of tensors on torch's meta device, or, of one such as `relu_`, its first argument. None
    where torch has to tell, or to say what is wrong."""
    rule = _RULES.get(operator)
    first = args[0] if args else None
    tensors = [x for x in (*(first if isinstance(first, list) else args), *kwargs.values()) if isinstance(x, Tensor)]  # pyright: ignore
    if rule is None or not tensors or any(not x.is_floating_point() or x.dtype != tensors[0].dtype for x in tensors):
        return None
    if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())) or "out" in kwargs:
        return None
    return rule(*args, **kwargs)


def _empty(shape: Sequence[int], like: Tensor, order: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device="meta", memory_format=order)


def _order(x: Tensor) -> torch.memory_format:
    nhwc = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def _alike(x: Tensor, *_: Any, **__: Any) -> Tensor:
    if x.numel() == 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)):  # no gaps
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return _empty(x.shape, x)


def _softmax(x: Tensor, axis: int, *_: Any) -> Tensor | None:
    return _alike(x) if -x.dim() <= axis < x.dim() else None


def _norm(x: Tensor, *settings: Any, **_: Any) -> Tensor | None:
    fits = x.dim() > 1 and all(one.shape == x.shape[1:2] for one in settings if isinstance(one, Tensor))
    return _empty(x.shape, x, _order(x)) if fits else None


def _group_norm(x: Tensor, groups: int, *settings: Any, **_: Any) -> Tensor | None:
    return _norm(x, *settings) if groups > 0 and x.dim() > 1 and x.shape[1] % groups == 0 else None


def _layer_norm(x: Tensor, shape: Sequence[int], *settings: Any, **_: Any) -> Tensor | None:
    tensors = [one for one in settings if isinstance(one, Tensor)]
    fits = x.shape[-len(shape) :] == (*shape,) and all(one.shape == (*shape,) for one in tensors)
    return _empty(x.shape, x) if fits else None


def _itself(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _binary(x: Tensor, y: Any, **_: Any) -> Tensor | None:
    if not isinstance(y, Tensor):
        return _alike(x) if isinstance(y, (int, float)) else None
    shape = _broadcast(x.shape, y.shape)
    if shape is None:
        return None
    full = next((one for one in (x, y) if one.shape == shape), None)
    return _empty(shape, x) if full is None else _alike(full)


def _binary_in_place(x: Tensor, y: Any, **_: Any) -> Tensor | None:
    fits = isinstance(y, (int, float)) or (isinstance(y, Tensor) and _broadcast(x.shape, y.shape) == x.shape)
    return x if fits else None


def _broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    axes = max(len(a), len(b))
    pairs = zip((1,) * (axes - len(a)) + tuple(a), (1,) * (axes - len(b)) + tuple(b), strict=True)
    found = [x if y == 1 else y if x in (1, y) else None for x, y in pairs]
    return None if None in found else tuple(found)  # pyright: ignore


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor | None:
    axes = weight.dim() - 2
    if x.dim() != axes + 2 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    steps, gaps = _each(stride, axes), _each(dilation, axes)
    spans = [gap * (k - 1) for gap, k in zip(gaps, weight.shape[2:], strict=True)]
    if padding == "same":
        around = spans if set(steps) == {1} else [-1]
    else:
        around = [2 * p for p in _each((0,) if isinstance(padding, str) else padding, axes)]
    if len(steps) != axes or len(gaps) != axes or len(around) != axes:
        return None
    sizes = [(n + p - s - 1) // t + 1 for n, p, s, t in zip(x.shape[2:], around, spans, steps, strict=True)]
    if min([*sizes, *(n + p - s for n, p, s in zip(x.shape[2:], around, spans, strict=True))]) < 1:
        return None
    order = _order(x)
    order = _order(weight) if order is torch.contiguous_format else order
    return _empty((x.shape[0], weight.shape[0], *sizes), x, order)


def _each(value: Sequence[int], axes: int) -> list[int]:
    """One number stands for all axes."""
    return [*value] * axes if len(value) == 1 else [*value]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return None
    return None if bias is not None and bias.shape != weight.shape[:1] else _empty((*x.shape[:-1], len(weight)), x)


def _matmul(x: Tensor, y: Tensor) -> Tensor | None:
    if x.dim() < 2 or y.dim() < 2 or x.shape[-1] != y.shape[-2]:
        return None
    stacked = _broadcast(x.shape[:-2], y.shape[:-2])
    return None if stacked is None else _empty((*stacked, x.shape[-2], y.shape[-1]), x)


def _max_pool(
    x: Tensor,
    size: Sequence[int],
    step: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil: bool = False,
) -> Tensor | None:
    if x.dim() != 4:
        return None
    shape: list[int] = []
    for axis in range(2):
        k, t, p, d = (_each(value, 2)[axis] for value in (size, step or size, padding, dilation))
        if 2 * p > k or t < 1:
            return None
        n = x.shape[axis + 2]
        room = n + 2 * p - d * (k - 1) - 1
        count = (room + (t - 1 if ceil else 0)) // t + 1
        # The last window has to begin inside the image, or in the padding before it.
        shape.append(count - 1 if ceil and (count - 1) * t >= n + p else count)
    return None if min(shape) < 1 else _empty((*x.shape[:2], *shape), x, _order(x))


def _average_pool(
    x: Tensor,
    size: Sequence[int],
    step: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil: bool = False,
    include_pad: bool = True,
    divisor: int | None = None,
) -> Tensor | None:
    return _max_pool(x, size, step, padding, (1,), ceil)


def _adaptive_pool(x: Tensor, size: Sequence[int]) -> Tensor | None:
    return _empty((*x.shape[:2], *_each(size, 2)), x, _order(x)) if x.dim() == 4 else None


def _reduced(x: Tensor, axes: Sequence[int] | None, keep: bool = False, **_: Any) -> Tensor | None:
    if not axes or not all(-x.dim() <= axis < x.dim() for axis in axes):
        return None
    gone = {axis % x.dim() for axis in axes}
    kept = ((axis, n) for axis, n in enumerate(x.shape) if keep or axis not in gone)
    return _empty([1 if axis in gone else n for axis, n in kept], x) if len(gone) == len(axes) else None


def _cat(tensors: Sequence[Tensor], axis: int = 0) -> Tensor | None:
    first = tensors[0]
    if not -first.dim() <= axis < first.dim():
        return None
    axis %= first.dim()
    others = {(*x.shape[:axis], *x.shape[axis + 1 :]) for x in tensors}
    if len(others) != 1 or any(x.dim() != first.dim() for x in tensors):
        return None
    shape = (*first.shape[:axis], sum(x.shape[axis] for x in tensors), *first.shape[axis + 1 :])
    orders = {_order(x) for x in tensors}
    return _empty(shape, first, orders.pop() if len(orders) == 1 else torch.contiguous_format)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor | None:
    fit = query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    fit = fit and query.shape[3] == key.shape[3] and key.shape[2] == value.shape[2]
    return _empty((*query.shape[:3], value.shape[3]), query) if fit else None


def _rules() -> dict[Any, Rule]:
    aten = torch.ops.aten
    found: dict[Any, Rule] = {
        aten.linear.default: _linear,
        aten.matmul.default: _matmul,
        aten.max_pool2d.default: _max_pool,
        aten.avg_pool2d.default: _average_pool,
        aten.adaptive_avg_pool2d.default: _adaptive_pool,
        aten.mean.dim: _reduced,
        aten.sum.dim_IntList: _reduced,
        aten.cat.default: _cat,
        aten.scaled_dot_product_attention.default: _attention,
        aten.pow.Tensor_Scalar: _alike,
        aten.softmax.int: _softmax,
        aten.batch_norm.default: _norm,
        aten.instance_norm.default: _norm,
        aten.group_norm.default: _group_norm,
        aten.layer_norm.default: _layer_norm,
    }
    for name in ("conv1d", "conv2d", "conv3d"):
        found[getattr(aten, name).default] = found[getattr(aten, name).padding] = _convolution
    for names, rule, in_place in ((_UNARY, _alike, _itself), (_BINARY, _binary, _binary_in_place)):
        for name in names:
            kind = "Tensor" if rule is _binary else "default"
            found[getattr(getattr(aten, name), kind)] = rule
            if hasattr(aten, f"{name}_"):
                found[getattr(getattr(aten, f"{name}_"), kind)] = in_place
    return found


_RULES = _rules()
