"""Rules of the operators that have parameters or a channel axis of their own: layers, norms, pooling, padding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from tersenet.graph.labels import End, IntArray, Labeller, LayerUse, Rule, Value, axis_vector, describe, spread
from tersenet.graph.trace import module_of
from tersenet.nn.channel_pad import ZeroPadShortcut

SPATIAL = frozenset(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest1d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d".split()
)
CONVOLUTIONS = frozenset("conv1d conv2d conv3d".split())
TRANSPOSED = frozenset("conv_transpose1d conv_transpose2d conv_transpose3d".split())


def _spatial(run: Labeller, node: Node) -> Any:
    """Pooling and resizing: every channel on its own; only the spatial size changes."""
    value = run.get(node.args[0])
    meta: Any = node.meta["val"]
    out = meta if isinstance(meta, Tensor) else meta[0]
    vector = axis_vector(value.labels, 1)
    if vector is None:
        return run.refuse(node, f"{describe(node)} works on an axis that holds channels")
    result = Value(spread(vector, out.shape), value.origin)
    return result if isinstance(meta, Tensor) else [result] * len(meta)


def _batch_norm(run: Labeller, node: Node) -> Any:
    value = run.get(node.args[0])
    vector = axis_vector(value.labels, 1)
    names = [run.parameter_name(a) for a in node.args[1:5] if isinstance(a, Node)]
    if vector is None or None in names:
        return run.refuse(node, f"{describe(node)} normalises something other than channels")
    tensors = tuple(n for n in names if n is not None)
    if not tensors:
        return value
    module = tensors[0].rpartition(".")[0]
    end = End("pass", module, tensors, 0, vector, [node], ((module, "num_features"),), value.origin)
    return Value(value.labels, frozenset({run.end(end)}))


def _prelu(run: Labeller, node: Node) -> Any:
    value = run.get(node.args[0])
    name = run.parameter_name(node.args[1])
    slope: Any = node.args[1]
    if name is None:
        return run.refuse(node, f"{describe(node)} has a computed slope")
    if slope.meta["val"].numel() == 1:
        return value
    vector = axis_vector(value.labels, 1)
    if vector is None:
        return run.refuse(node, f"{describe(node)} works on an axis that holds channels")
    module = name.rpartition(".")[0]
    end = End("pass", module, (name,), 0, vector, [node], ((module, "num_parameters"),), value.origin)
    return Value(value.labels, frozenset({run.end(end)}))


def _linear(run: Labeller, node: Node) -> Any:
    return _layer(run, node, channel_axis=-1, groups=1, out_axis=0, in_axis=1, sizes=("in_features", "out_features"))


def _convolution(run: Labeller, node: Node) -> Any:
    groups: Any = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    sizes = ("in_channels", "out_channels")
    return _layer(run, node, channel_axis=1, groups=groups, out_axis=0, in_axis=1, sizes=sizes)


def _transposed(run: Labeller, node: Node) -> Any:
    groups: Any = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    if groups != 1:
        return run.refuse(node, f"{describe(node)} with groups={groups} is not understood")
    sizes = ("in_channels", "out_channels")
    return _layer(run, node, channel_axis=1, groups=1, out_axis=1, in_axis=0, sizes=sizes)


def _layer(
    run: Labeller, node: Node, channel_axis: int, groups: int, out_axis: int, in_axis: int, sizes: tuple[str, str]
) -> Any:
    value = run.get(node.args[0])
    weight_node: Any = node.args[1]
    weight = run.parameter_name(weight_node)
    bias_node: Any = node.args[2] if len(node.args) > 2 else None
    bias = run.parameter_name(bias_node)
    if not isinstance(value, Value) or weight is None or (bias_node is not None and bias is None):
        return run.refuse(node, f"{describe(node)} has weights that are computed in forward")
    vector = axis_vector(value.labels, channel_axis)
    if vector is None:
        return run.refuse(node, f"{describe(node)} reads an axis that is not one channel per entry")
    shape = weight_node.meta["val"].shape
    out = node.meta["val"]
    module = weight.rpartition(".")[0]
    tensors = (weight,) if bias is None else (weight, bias)
    per_group = len(vector) // groups
    if groups > 1 and per_group == 1:
        return _depthwise(run, node, value, vector, tensors, sizes)
    read, made = vector, run.axis_labels(weight, out_axis, int(shape[out_axis]))
    if groups > 1:
        # The same places are kept in every group, so that the groups stay equal in size.
        read, made = _tie_groups(run, vector, groups), _tie_groups(run, made, groups, whole=True)
    reading = End("consume", module, (weight,), in_axis, read, [node], ((module, sizes[0]),), value.origin, vector)
    making = End("produce", module, tensors, out_axis, made, [node], ((module, sizes[1]),), value.origin)
    consumes, produces = run.end(reading), run.end(making)
    macs = (value.labels if out_axis == 1 else out).numel() * int(shape[1]) * math.prod(int(s) for s in shape[2:])
    run.out.layers.append(LayerUse(module, macs, produces, consumes))
    return Value(spread(made, out.shape, channel_axis % out.dim()), frozenset({produces}))


def _tie_groups(run: Labeller, labels: IntArray, groups: int, whole: bool = False) -> IntArray:
    table = labels.reshape(groups, -1)
    for row in table[1:]:
        run.merge(table[0], row)
    return labels if whole else table[0]


def _depthwise(
    run: Labeller, node: Node, value: Value, vector: IntArray, tensors: tuple[str, ...], sizes: tuple[str, str]
) -> Any:
    """One input channel per group: groups go as a whole. With a multiplier, a channel's outputs share its label."""
    weight_node: Any = node.args[1]
    out = node.meta["val"]
    shape = weight_node.meta["val"].shape
    labels = np.repeat(vector, int(shape[0]) // len(vector))
    module = tensors[0].rpartition(".")[0]
    attributes = ((module, sizes[0]), (module, sizes[1]), (module, "groups"))
    end = run.end(End("pass", module, tensors, 0, labels, [node], attributes, value.origin))
    run.out.layers.append(LayerUse(module, out.numel() * math.prod(int(s) for s in shape[2:]), end, None))
    return Value(spread(labels, out.shape), frozenset({end}))


def _pad(run: Labeller, node: Node) -> Any:
    value = run.get(node.args[0])
    amounts: Any = list(node.args)[1]
    shape = node.meta["val"].shape
    if len(amounts) // 2 <= value.labels.dim() - 2:
        return _spatial(run, node)
    before, after = int(amounts[-2]), int(amounts[-1])
    vector = axis_vector(value.labels, 1)
    if vector is None or len(amounts) // 2 != value.labels.dim() - 1 or min(before, after) < 0:
        return run.refuse(node, f"{describe(node)} pads an axis that holds channels")
    name = module_of(node)
    left, right = run.fresh(before), run.fresh(after)
    origin = value.origin
    if isinstance(run.module(name), ZeroPadShortcut):
        ends = [("before", left), ("after", right)]
        origin |= {run.end(End("pass", name, (), 0, e, [node], ((name, a),), origin)) for a, e in ends if len(e)}
    else:
        run.freeze(np.concatenate([left, right]), f"{describe(node)} pads channels by numbers fixed in forward")
    return Value(spread(np.concatenate([left, vector, right]), shape), origin)


RULES: dict[str, Rule] = {
    **dict.fromkeys(SPATIAL, _spatial),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(TRANSPOSED, _transposed),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
    "pad": _pad,
    "constant_pad_nd": _pad,
}
