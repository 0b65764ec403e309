"""Matrix products: linear layers where one side is a parameter, attention where both are activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersenet.graph import weight_rules
from tersenet.graph.labels import (
    End,
    IntArray,
    Labeller,
    LayerUse,
    Rule,
    Value,
    Weight,
    array_of,
    axis_vector,
    describe,
    slim,
    spread,
    varying,
)
from tersenet.graph.ties import collapse, read_whole
from tersenet.graph.trace import Op, Ref

_SIZES = ("in_features", "out_features")


def _product(run: Labeller, op: Op) -> Any:
    """mm, bmm, addmm and baddbmm: (..., n, k) times (..., k, m)."""
    place = 1 if op.name in ("addmm", "baddbmm", "addmv") else 0
    left, right = op.args[place], op.args[place + 1]
    bias = op.args[0] if place else None
    a, b = run.get(left), run.get(right)
    if isinstance(a, Value) and isinstance(b, Value):
        result = attend(run, op, a.labels, b.labels, place)
        _count(run, op, result, a.labels.shape[-1], a.labels)
        # Without an origin: nothing can be put back at full width in front of a product.
        return Value(result, weighs=not a.weighs and not b.weighs)
    if isinstance(a, Value) and isinstance(b, Weight) and len(b.shape) == 2:
        return _linear(run, op, a, b, bias, place)
    if isinstance(a, Value) and not isinstance(b, Weight):
        return _constant(run, op, a, axis=-1)
    if isinstance(b, Value):
        # A parameter or constant from the left mixes places, if it meets no channels.
        axes = varying(b.labels)
        if b.labels.dim() - 2 in axes:
            return run.refuse(op, f"{describe(op)} mixes channels with a matrix from the left")
        result = slim(b.labels.narrow(-2, 0, 1).expand(run.shape(op.result)))
        _count(run, op, result, b.labels.shape[-2], b.labels)
        return Value(result, b.origin)
    return run.refuse(op, f"{describe(op)} is not understood")


def _constant(run: Labeller, op: Op, value: Value, axis: int) -> Any:
    if value.labels.dim() - 1 in varying(value.labels):
        return run.refuse(op, f"{describe(op)} mixes channels with a matrix that is no parameter")
    result = slim(value.labels.narrow(axis, 0, 1).expand(run.shape(op.result)))
    _count(run, op, result, value.labels.shape[-1], value.labels)
    return Value(result, value.origin)


def _count(run: Labeller, op: Op, result: Tensor, width: int, read: Tensor) -> None:
    """Count a product that is no layer: it goes down with the heads, or with the channels that it sums over."""
    shape = run.shape(op.result if not isinstance(op.result, list) else op.result[0])
    scale = result if varying(result) else read
    axes = varying(scale)
    scales = (array_of(scale, axes).reshape(-1),) if axes else ()
    run.out.layers.append(LayerUse(op.place.module, int(np.prod(shape)) * width, scales))


def _linear(run: Labeller, op: Op, value: Value, weight: Weight, bias: Any, place: int) -> Any:
    """A linear layer: `weight` is (C_in, C_out), the parameter transposed."""
    if value.labels.dim() - 1 not in varying(value.labels) and varying(value.labels):
        # Places are mixed (token mixing), every channel by itself.
        if bias is not None and isinstance(run.get(bias), Weight):
            run.freeze(value, f"{describe(op)} adds one bias to all channels")
        return _constant(run, op, value, axis=-1)
    vector = axis_vector(value.labels, -1)
    if vector is None:
        return run.refuse(op, f"{describe(op)} reads an axis that is not one channel per entry")
    return layer(run, op, value, vector, weight, bias, axes=(1, 0), channel_axis=-1, argument=place, sizes=_SIZES)


def layer(
    run: Labeller,
    op: Op,
    value: Value,
    vector: IntArray,
    weight: Weight,
    bias: Any,
    axes: tuple[int, int],
    channel_axis: int,
    argument: int,
    sizes: tuple[str, str],
    groups: int = 1,
    macs: int | None = None,
) -> Any:
    """A layer that reads the channels `vector` and makes new ones: `axes` are the weight's output and input axis."""
    made_by, read_by = weight_rules.carrying(run, weight, axes[0]), weight_rules.carrying(run, weight, axes[1])
    if not made_by or not read_by:
        return run.refuse(op, f"{describe(op)} has weights that are computed in a way that is not understood")
    name, out_axis = made_by[0]
    module = name.rpartition(".")[0].split(".parametrizations.")[0]
    used_in = op.place.module if op.place.module in run.modules else module
    read = vector.reshape(groups, -1)
    for row in read[1:]:
        run.merge(read[0], row)
    for key in read_by:
        run.merge(weight_rules.along(weight, key, axes[1]), read[0])
    made = weight_rules.along(weight, made_by[0], axes[0])
    for row in made.reshape(groups, -1)[1:]:
        run.merge(made.reshape(groups, -1)[0], row)
    for key in made_by[1:]:
        run.merge(made, weight_rules.along(weight, key, axes[0]))
        weight_rules.record(run, op, key, value.origin, role="consume")
    bias_name = run.slot(bias).parameter if isinstance(bias, Ref) else None
    tensors = (name,) if bias_name is None else (name, bias_name)
    reader, read_axis = read_by[0]
    labels = run.axis_labels(reader, read_axis, 0)
    reading = End("consume", module, (reader,), read_axis, labels, [op.number], _sizes(run, module, used_in, sizes[0]))
    reading.fed_by, reading.reads = value.origin, vector
    reading.reads_axis, reading.reads_argument = channel_axis, argument
    reading.computed = not weight.moved
    labels = run.axis_labels(name, out_axis, 0)
    making = End("produce", module, tensors, out_axis, labels, [op.number], _sizes(run, module, used_in, sizes[1]))
    making.fed_by = value.origin
    if bias_name is not None:
        run.merge(run.axis_labels(bias_name, 0, len(made)), made)
    run.end(reading)
    produces = run.end(making)
    for key in read_by[1:]:
        weight_rules.record(run, op, key, value.origin, role="consume")
    shape = run.shape(op.result)
    if macs is None:
        macs = int(np.prod(shape)) * len(vector)
    run.out.layers.append(LayerUse(module, macs, (made, read[0])))
    result = spread(made, shape, channel_axis % len(shape))
    if isinstance(bias, Ref) and bias_name is None:
        held = run.get(bias)
        if isinstance(held, Weight):
            wide = Weight(held.shape, held.axes)
            result = weight_rules.attach(run, op, wide, result, frozenset({produces}), harmless=False)
    return Value(result, frozenset({produces}))


def _sizes(run: Labeller, module: str, used_in: str, size: str) -> tuple[tuple[str, str], ...]:
    names = dict.fromkeys([module, used_in])
    return tuple((n, size) for n in names if isinstance(vars(run.modules.get(n) or object).get(size), int))


def attend(run: Labeller, op: Op, a: Tensor, b: Tensor, argument: int = 0) -> Tensor:
    """Labels of the product of two activations, (..., n, k) and (..., k, m).

    Where there are heads (labels that differ along the leading axes), a head's channels go together.
    """
    shape = run.shape(op.result if not isinstance(op.result, list) else op.result[0])
    n, m = a.dim() - 2, b.dim() - 1
    for which in (0, 1):
        labels, axis = ((a, n + 1), (b, m - 1))[which]
        axes = varying(labels)
        if axis in axes and len(axes) > 1:
            labels = collapse(run, labels, [axis])
        elif axis in axes:
            vector = array_of(labels, [axis])
            read_whole(run, op, Value(labels), vector, axis, argument + which)
        a, b = (labels, b) if which == 0 else (a, labels)
    # Along k, what is multiplied goes together.
    if n + 1 in varying(a) and m - 1 in varying(b):
        run.merge(array_of(a, [n + 1]), array_of(b, [m - 1]))
    rows = n in varying(a)
    columns = m in varying(b)
    if rows and columns:
        if not _heads(a) and not _heads(b):
            run.freeze(a, f"{describe(op)} multiplies all channels with each other")
            run.freeze(b, f"{describe(op)} multiplies all channels with each other")
            return torch.zeros(1, dtype=torch.long).expand(shape)
        a, b = collapse(run, a, [n]), collapse(run, b, [m])
    out_a, out_b = _outer(a, -1, shape), _outer(b, -2, shape)
    wide, narrow = (out_a, out_b) if len(varying(out_a)) >= len(varying(out_b)) else (out_b, out_a)
    axes = varying(wide)
    if axes and set(varying(narrow)) <= set(axes) and varying(narrow):
        run.merge(array_of(wide, axes).reshape(-1), array_of(narrow, axes).reshape(-1))
    return wide


def _outer(labels: Tensor, summed: int, shape: tuple[int, ...]) -> Tensor:
    """What is left of a factor's labels in the product, when the axis `summed` is gone."""
    first = labels.narrow(summed, 0, 1)
    if labels.dim() + summed in varying(labels):
        first = torch.zeros(1, dtype=torch.long).expand(first.shape)
    return slim(first.expand(shape))


def _heads(labels: Tensor) -> bool:
    return any(axis < labels.dim() - 2 for axis in varying(labels))


def _attention(run: Labeller, op: Op) -> Any:
    """Fused attention of queries (N, heads, L, E), keys and values."""
    q, k, v = (run.get(op.args[i]) for i in range(3))
    if not all(isinstance(x, Value) for x in (q, k, v)):
        return run.refuse(op, f"{describe(op)} has queries, keys or values that are parameters")
    heads: list[Tensor] = []
    for x in (q, k, v):
        axes = varying(x.labels)
        if axes and not _heads(x.labels):
            # The scale depends on the number of channels, so they stay.
            return run.refuse(op, f"{describe(op)} scales by the channels of its one head")
        heads.append(collapse(run, x.labels, [a for a in axes if a >= x.labels.dim() - 2]))
    for x in heads[1:]:
        axes = varying(heads[0])
        if axes and varying(x) == axes and array_of(x, axes).shape == array_of(heads[0], axes).shape:
            run.merge(array_of(heads[0], axes).reshape(-1), array_of(x, axes).reshape(-1))
        elif varying(x) or axes:
            return run.refuse(op, f"{describe(op)} shares keys between heads")
    mask = op.kwargs.get("attn_mask")
    shape = run.shape(op.result[0])
    labels = slim(heads[2].narrow(-1, 0, 1).narrow(-2, 0, 1).expand(shape))
    if isinstance(mask, Ref) and isinstance(run.get(mask), Weight):
        labels = weight_rules.attach(run, op, run.get(mask), _map(labels, run.shape(mask)), frozenset(), True)
        labels = slim(labels.narrow(-1, 0, 1).narrow(-2, 0, 1).expand(shape))
    _count(run, op, labels, run.shape(op.args[1])[-2], labels)
    _count(run, op, labels, run.shape(op.args[1])[-2], labels)
    return [Value(labels), *[None] * (len(op.result) - 1)]


def _map(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Labels of attention maps (N, heads, L, S) for these of heads."""
    full = labels.narrow(-1, 0, 1).narrow(-2, 0, 1)
    return slim(full.expand(*full.shape[:-2], *shape[-2:]))


RULES: dict[str, Rule] = {
    **dict.fromkeys("mm bmm addmm baddbmm".split(), _product),
    **dict.fromkeys(
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention".split(),
        _attention,
    ),
}
