"""Rules of the operators that have parameters or a channel axis of their own: layers, norms, pooling, padding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from tersenet.graph import weight_rules
from tersenet.graph.contraction_rules import layer
from tersenet.graph.labels import (
    End,
    IntArray,
    Labeller,
    LayerUse,
    Rule,
    Statistic,
    Value,
    Weight,
    array_of,
    axis_vector,
    describe,
    spread,
    varying,
)
from tersenet.graph.operators import SPATIAL
from tersenet.graph.ties import collapse
from tersenet.graph.trace import Op, Ref
from tersenet.nn.channel_pad import ZeroPadShortcut


def _results(op: Op, first: Value) -> Any:
    """Statistics and indices that come beside the result carry no channels of their own."""
    return [first, *[None] * (len(op.result) - 1)] if isinstance(op.result, list) else first


def _first(op: Op) -> Any:
    return op.result[0] if isinstance(op.result, list) else op.result


def _spatial(run: Labeller, op: Op) -> Any:
    """Pooling and resizing: every channel on its own; only the spatial size changes."""
    value = run.get(op.args[0])
    if not isinstance(value, Value):
        return run.refuse(op, f"{describe(op)} reads no activation")
    shape = run.shape(_first(op))
    axes = varying(value.labels)
    if len(axes) > 1 or any(shape[a] != value.labels.shape[a] for a in axes):
        return run.refuse(op, f"{describe(op)} works on an axis that holds channels")
    labels = value.labels
    for axis in range(labels.dim()):
        if axis not in axes:
            labels = labels.narrow(axis, 0, 1)
    return _results(op, Value(labels.expand(shape), value.origin))


def _region_pool(run: Labeller, op: Op) -> Any:
    """RoI align and RoI pooling, where torchvision's compiled ones run: channels of maps, averaged in boxes."""
    run.freeze(run.get(op.args[1]), f"{describe(op)} takes it for boxes")
    return _spatial(run, op)


def _batch_norm(run: Labeller, op: Op) -> Any:
    value = run.get(op.args[0])
    refs = [a for a in op.args[1:5] if isinstance(a, Ref)]
    if not isinstance(value, Value):
        return run.refuse(op, f"{describe(op)} reads no activation")
    vector = axis_vector(value.labels, 1)
    names = [run.slot(ref).parameter for ref in refs]
    if vector is None or (None in names and not all(isinstance(run.get(ref), Weight) for ref in refs)):
        return run.refuse(op, f"{describe(op)} normalises something other than channels")
    if None in names or not names:
        labels = value.labels
        for ref in refs:
            weight = run.get(ref)
            shape = (1, -1, *[1] * (labels.dim() - 2))
            held = Weight((1, len(vector)), {k: v.reshape(shape) for k, v in weight.axes.items()})
            labels = weight_rules.attach(run, op, held, labels, value.origin, harmless=True)
        return _results(op, Value(labels, value.origin))
    tensors = tuple(n for n in names if n is not None)
    return _results(op, _per_channel(run, op, value, vector, tensors, ("num_features",)))


def _per_channel(
    run: Labeller, op: Op, value: Value, vector: IntArray, tensors: tuple[str, ...], sizes: tuple[str, ...]
) -> Value:
    """A layer that treats every channel on its own, with parameters of one entry per channel."""
    module = tensors[0].rpartition(".")[0]
    known = tuple((module, s) for s in sizes if s in vars(run.modules[module]))
    for name in tensors:
        run.merge(run.axis_labels(name, 0, len(vector)), vector)
    end = End("pass", module, tensors, 0, vector, [op.number], known, value.origin)
    return Value(value.labels, frozenset({run.end(end)}))


def _group_norm(run: Labeller, op: Op) -> Any:
    """Statistics over the channels of a group: all groups keep the same number of channels."""
    value = run.get(op.args[0])
    vector = axis_vector(value.labels, 1) if isinstance(value, Value) else None
    if vector is None:
        return run.refuse(op, f"{describe(op)} normalises something other than channels")
    groups = op.args[6]
    table = vector.reshape(groups, -1)
    if table.shape[1] > 1:
        run.table(table, (1,), op)
        run.out.statistics.append(Statistic(op.number, 1, vector))
    names = tuple(n for n in (run.slot(r).parameter for r in op.args[1:3] if isinstance(r, Ref)) if n is not None)
    if not names:
        return _results(op, value)
    return _results(op, _per_channel(run, op, value, vector, names, ("num_channels",)))


def _layer_norm(run: Labeller, op: Op) -> Any:
    """Statistics over the last axes; where these hold channels, over the channels that are kept."""
    value = run.get(op.args[0])
    if not isinstance(value, Value):
        return run.refuse(op, f"{describe(op)} reads no activation")
    labels, sizes = value.labels, op.args[1]
    inside = [a for a in varying(labels) if a >= labels.dim() - len(sizes)]
    names = [run.slot(r).parameter for r in op.args[2:4] if isinstance(r, Ref)]
    if inside and len(sizes) > 1:
        return run.refuse(op, f"{describe(op)} normalises several axes at once")
    if inside and varying(labels) == inside:
        vector = array_of(labels, inside)
        run.out.statistics.append(Statistic(op.number, inside[0], vector))
        tensors = tuple(n for n in names if n is not None)
        if tensors and len(tensors) == len(names):
            return _results(op, _per_channel(run, op, value, vector, tensors, ("normalized_shape",)))
        return _results(op, value)
    if inside:
        labels = collapse(run, labels, inside)
    return _results(op, Value(labels, value.origin))


def _prelu(run: Labeller, op: Op) -> Any:
    value = run.get(op.args[0])
    slope = run.get(op.args[1])
    name = run.slot(op.args[1]).parameter
    if not isinstance(value, Value) or (isinstance(slope, Value)):
        return run.refuse(op, f"{describe(op)} has a computed slope")
    if math.prod(run.shape(op.args[1])) == 1:
        return value
    vector = axis_vector(value.labels, 1)
    if vector is None or (name is None and not isinstance(slope, Weight)):
        return run.refuse(op, f"{describe(op)} works on an axis that holds channels")
    if name is not None:
        return _per_channel(run, op, value, vector, (name,), ("num_parameters",))
    origin = value.origin
    for key in weight_rules.carrying(run, slope, 1 if len(slope.shape) > 1 else 0):
        name, axis = key
        run.merge(run.axis_labels(name, axis, len(vector)), vector)
        module = name.rpartition(".")[0]
        known = tuple((module, s) for s in ("num_parameters",) if s in vars(run.modules[module]))
        origin = frozenset({run.end(End("pass", module, (name,), axis, vector, [op.number], known, value.origin))})
    return Value(value.labels, origin)


def _convolution(run: Labeller, op: Op) -> Any:
    value, weight = run.get(op.args[0]), run.get(op.args[1])
    transposed, groups = bool(op.args[6]), int(op.args[8])
    if not isinstance(weight, Weight):
        return run.refuse(op, f"{describe(op)} has weights that are computed from the input")
    shape, out = weight.shape, run.shape(op.result)
    if not isinstance(value, Value):
        labels = run.fresh(run.shape(op.args[0])[1])
        run.freeze(labels, f"{describe(op)} reads a constant")
        value = Value(spread(labels, run.shape(op.args[0])))
    vector = axis_vector(value.labels, 1)
    if vector is None:
        return run.refuse(op, f"{describe(op)} reads an axis that is not one channel per entry")
    taps = math.prod(shape[2:])
    if groups > 1 and len(vector) == groups and (shape[1] == 1 or not transposed):
        return _depthwise(run, op, value, vector, weight, taps)
    if transposed and groups > 1:
        return run.refuse(op, f"{describe(op)} is transposed with groups={groups}, which is not understood")
    axes = (1, 0) if transposed else (0, 1)
    base = run.shape(op.args[0]) if transposed else out
    macs = math.prod(base) * shape[1] * taps
    return layer(run, op, value, vector, weight, op.args[2], axes, 1, 0, ("in_channels", "out_channels"), groups, macs)


def _depthwise(run: Labeller, op: Op, value: Value, vector: IntArray, weight: Weight, taps: int) -> Any:
    """One input channel per group: groups go as a whole. With a multiplier, a channel's outputs share its label."""
    out = run.shape(op.result)
    labels = np.repeat(vector, out[1] // len(vector))
    keys = weight_rules.carrying(run, weight, 0)
    if not keys:
        return run.refuse(op, f"{describe(op)} has weights that are computed in a way that is not understood")
    for key in keys:
        run.merge(weight_rules.along(weight, key, 0), labels)
    name = keys[0][0]
    bias = run.slot(op.args[2]).parameter if isinstance(op.args[2], Ref) else None
    tensors = (name,) if bias is None else (name, bias)
    if bias is not None:
        run.merge(run.axis_labels(bias, 0, out[1]), labels)
    module = name.rpartition(".")[0]
    names = dict.fromkeys([module, op.place.module])
    sizes = ("in_channels", "out_channels", "groups")
    known = tuple((n, s) for n in names for s in sizes if isinstance(vars(run.modules.get(n) or object).get(s), int))
    end = run.end(End("pass", module, tensors, keys[0][1], labels, [op.number], known, value.origin))
    for key in keys[1:]:
        weight_rules.record(run, op, key, value.origin, role="consume")
    result = spread(labels, out)
    if isinstance(op.args[2], Ref) and bias is None and isinstance(run.get(op.args[2]), Weight):
        held: Weight = run.get(op.args[2])
        shaped = {k: v.reshape(1, -1, *[1] * (len(out) - 2)) for k, v in held.axes.items()}
        weight_rules.attach(run, op, Weight((1, out[1]), shaped), result, frozenset({end}), harmless=False)
    run.out.layers.append(LayerUse(module, math.prod(out) * taps, (labels,)))
    return Value(result, frozenset({end}))


def _pad(run: Labeller, op: Op) -> Any:
    value = run.get(op.args[0])
    if not isinstance(value, Value):
        return run.refuse(op, f"{describe(op)} reads no activation")
    amounts: Any = op.args[1]
    shape = run.shape(op.result)
    axes = varying(value.labels)
    padded = [value.labels.dim() - 1 - i for i in range(len(amounts) // 2) if amounts[2 * i] or amounts[2 * i + 1]]
    if value.shifted and padded:
        # Behind a removed filter it is no channel of zeros, and at the border no constant.
        run.freeze(value.labels, f"{describe(op)} pads channels to which one number was added")
    if not set(axes) & set(padded):
        return _spatial_pad(value, shape, axes)
    vector = axis_vector(value.labels, 1)
    before, after = int(amounts[-2]), int(amounts[-1])
    if vector is None or len(amounts) // 2 != value.labels.dim() - 1 or min(before, after) < 0 or axes != [1]:
        return run.refuse(op, f"{describe(op)} pads an axis that holds channels")
    name = op.place.module
    left, right = run.fresh(before), run.fresh(after)
    origin = value.origin
    if isinstance(run.module(name), ZeroPadShortcut):
        ends = [("before", left), ("after", right)]
        origin |= {run.end(End("pass", name, (), 0, e, [op.number], ((name, a),), origin)) for a, e in ends if len(e)}
    else:
        run.freeze(np.concatenate([left, right]), f"{describe(op)} pads channels by numbers fixed in forward")
    return Value(spread(np.concatenate([left, vector, right]), shape), origin)


def _spatial_pad(value: Value, shape: tuple[int, ...], axes: list[int]) -> Value:
    labels: Tensor = value.labels
    for axis in range(labels.dim()):
        if axis not in axes:
            labels = labels.narrow(axis, 0, 1)
    return Value(labels.expand(shape), value.origin)


RULES: dict[str, Rule] = {
    **dict.fromkeys(SPATIAL, _spatial),
    **dict.fromkeys(("roi_align", "roi_pool"), _region_pool),
    "convolution": _convolution,
    "native_batch_norm": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "_prelu_kernel": _prelu,
    "prelu": _prelu,
    "constant_pad_nd": _pad,
}
