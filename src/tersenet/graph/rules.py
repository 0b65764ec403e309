"""What each operator does to channel labels. An operator without a rule freezes what it reads, with the reason."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from tersenet.graph import layer_rules
from tersenet.graph.labels import End, Labeller, Rule, Value, axis_vector, compressed, describe, spread
from tersenet.graph.ties import tie_regrouped

UNARY = frozenset(
    "relu relu6 hardtanh leaky_relu elu selu celu silu gelu mish softplus softsign sigmoid tanh hardswish hardsigmoid "
    "log_sigmoid hardshrink softshrink threshold dropout feature_dropout alpha_dropout clone contiguous detach alias "
    "lift_fresh lift_fresh_copy to _to_copy neg abs exp log sqrt rsqrt reciprocal square sign round floor ceil clamp "
    "clamp_min clamp_max nan_to_num bernoulli erf type_as".split()
)
ELEMENTWISE = frozenset("add sub mul div pow maximum minimum where lerp addcmul addcdiv rsub eq ne lt le gt ge".split())
# These run themselves on the labels; `view` becomes `reshape`, because label tensors are not contiguous.
MOVEMENT = frozenset(
    "view _unsafe_view reshape permute transpose t flatten unflatten squeeze unsqueeze expand expand_as slice select "
    "split split_with_sizes chunk unbind stack pixel_shuffle pixel_unshuffle channel_shuffle roll flip narrow repeat "
    "movedim swapaxes numpy_T mT index_select".split()
)
REDUCTIONS = frozenset("mean sum amax amin max min var std".split())


def apply_rule(run: Labeller, node: Node) -> Any:
    """The value of `node`: labels for tensors that carry channels, None for constants."""
    if node.target is operator.getitem:
        source: Any = run.get(node.args[0])
        place: Any = node.args[1]
        return source[place] if isinstance(source, list) else source
    name = base_name(node)
    # An operator without a result, such as an assertion that export puts in, does nothing to channels.
    if node.meta.get("val") is None or not any(isinstance(v, Value) for v in run.operands(node)):
        return None
    rule = RULES.get(name)
    if rule is None:
        return run.refuse(node, f"{describe(node)} is not understood")
    return rule(run, node)


def base_name(node: Node) -> str:
    """`conv2d` of `aten::conv2d`, `relu` of `aten::relu_`."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.rsplit("::", 1)[-1].removesuffix("_") if schema is not None else str(node.target)


def _unary(run: Labeller, node: Node) -> Any:
    value = run.get(node.args[0])
    return value if isinstance(value, Value) else run.refuse(node, f"{describe(node)} has no tensor input")


def _movement(run: Labeller, node: Node) -> Any:
    name = base_name(node)
    values = [v for v in run.operands(node) if isinstance(v, Value)]
    origin = frozenset[int]().union(*(v.origin for v in values))
    args = [_labels_of(run, a) for a in node.args]
    kwargs = {k: _labels_of(run, a) for k, a in node.kwargs.items()}
    if name in ("view", "_unsafe_view", "reshape"):
        result: Any = args[0].reshape(args[1])
    elif name == "index_select":
        index = _constant(run, node.args[2])
        if index is None:
            return run.refuse(node, f"{describe(node)} has a computed index")
        result = args[0].index_select(args[1], index)
    else:
        target: Any = node.target
        result = target(*args, **kwargs)
    results: list[Tensor] = list(result) if isinstance(result, (list, tuple)) else [result]
    if isinstance(args[0], Tensor):
        tie_regrouped(run, node, name, args[0], results)
    values = [Value(r, origin) for r in results]
    return values if isinstance(result, (list, tuple)) else values[0]


def _labels_of(run: Labeller, arg: Any) -> Any:
    value = run.get(arg)
    if isinstance(value, Value):
        return value.labels
    if isinstance(value, list):
        return [v.labels if isinstance(v, Value) else v for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def _constant(run: Labeller, arg: Any) -> Tensor | None:
    """A buffer's real content (an index table), if `arg` is one."""
    name = run.parameter_name(arg)
    if name is None:
        return None
    return run.model.get_buffer(name).detach().cpu() if name in dict(run.model.named_buffers()) else None


def _cat(run: Labeller, node: Node) -> Any:
    tensors = run.get(node.args[0])
    if not all(isinstance(t, Value) for t in tensors):
        return run.refuse(node, f"{describe(node)} joins a constant to channels")
    axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    out = node.meta["val"].shape
    axis = axis % len(out)
    labels: list[Tensor] = [t.labels for t in tensors]
    for other in range(len(out)):
        if other != axis and all(t.stride(other) == 0 for t in labels):
            labels = [t.narrow(other, 0, 1) for t in labels]
    joined = torch.cat([t.contiguous() for t in labels], axis)
    return Value(joined.expand(out), frozenset[int]().union(*(t.origin for t in tensors)))


def _reduction(run: Labeller, node: Node) -> Any:
    """Over axes along which the labels don't change, a reduction keeps them; over channels it mixes them."""
    value = run.get(node.args[0])
    meta: Any = node.meta["val"]
    axes: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if axes is None or isinstance(axes, bool) or not isinstance(value, Value):
        return run.refuse(node, f"{describe(node)} reduces over channels")
    axes = sorted(a % value.labels.dim() for a in ([axes] if isinstance(axes, int) else axes))
    labels = value.labels
    for axis in axes:
        first = labels.narrow(axis, 0, 1)
        if labels.stride(axis) != 0 and not bool((compressed(labels) == compressed(first)).all()):
            return run.refuse(node, f"{describe(node)} reduces over channels")
        labels = first
    out = meta if isinstance(meta, Tensor) else meta[0]
    if len(out.shape) < labels.dim():
        for axis in reversed(axes):
            labels = labels.squeeze(axis)
    result = Value(labels, value.origin)
    return result if isinstance(meta, Tensor) else [result] * len(meta)


def _elementwise(run: Labeller, node: Node) -> Any:
    shape = node.meta["val"].shape
    operands: list[Any] = list(node.args)
    values = [run.get(a) for a in operands]
    tensors = [v for v in values if isinstance(v, Value)]
    widest = max(tensors, key=lambda v: v.labels.numel())
    if run.residual == "independent" and base_name(node) in ("add", "sub") and _is_residual(tensors):
        return _independent_sum(run, node, tensors)
    labels = widest.labels.expand(shape)
    for value in tensors:
        if value is not widest:
            _merge_broadcast(run, labels, value, node)
    origin = frozenset[int]().union(*(v.origin for v in tensors))
    for arg, value in zip(operands, values, strict=True):
        if isinstance(arg, Node) and not isinstance(value, Value):
            _parameter_operand(run, node, arg, labels, origin)
    return Value(labels, origin)


def _is_residual(tensors: list[Value]) -> bool:
    if len(tensors) != 2 or tensors[0].labels.shape != tensors[1].labels.shape:
        return False
    a, b = (axis_vector(t.labels, 1) if t.labels.dim() > 1 else None for t in tensors)
    return a is not None and b is not None and not np.array_equal(a, b)


def _independent_sum(run: Labeller, node: Node, tensors: list[Value]) -> Value:
    """The trunk keeps its full width; each summand is put back at its own channels before the sum."""
    for value in tensors:
        vector = axis_vector(value.labels, 1)
        if vector is not None:
            run.out.scatters.append((vector, value.origin, describe(node)))
    shape = node.meta["val"].shape
    trunk = run.fresh(int(shape[1]))
    run.freeze(trunk, f"the residual trunk keeps its full width at {describe(node)}")
    return Value(spread(trunk, shape), frozenset[int]().union(*(t.origin for t in tensors)))


def _merge_broadcast(run: Labeller, labels: Tensor, value: Value, node: Node) -> None:
    other = value.labels.reshape((1,) * (labels.dim() - value.labels.dim()) + tuple(value.labels.shape))
    for axis in range(labels.dim()):
        if other.shape[axis] == 1 and labels.shape[axis] > 1 and labels.stride(axis) != 0:
            run.freeze(value, f"{describe(node)} broadcasts it over channels")
            return
    a, b = labels, other.expand(labels.shape)
    for axis in range(labels.dim()):
        if a.stride(axis) == 0 and b.stride(axis) == 0:
            a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
    run.merge(a.reshape(-1).numpy(), b.reshape(-1).numpy())


def _parameter_operand(run: Labeller, node: Node, arg: Node, labels: Tensor, origin: frozenset[int]) -> None:
    """A parameter, buffer or constant in an elementwise operator: its channel axis is tied to the activation's."""
    meta = arg.meta.get("val")
    if not isinstance(meta, Tensor) or meta.numel() == 1:
        return
    varying = [a for a in range(labels.dim()) if compressed(labels).shape[a] > 1]
    offset = labels.dim() - meta.dim()
    touched = [a for a in varying if a >= offset and meta.shape[a - offset] > 1]
    if not touched:
        return
    name = run.parameter_name(arg)
    vector = axis_vector(labels, touched[0]) if len(varying) == 1 else None
    if name is None or vector is None:
        run.freeze(labels, f"{describe(node)} combines it with a tensor of fixed size")
        return
    run.end(End("pass", name.rpartition(".")[0], (name,), touched[0] - offset, vector, [node], (), origin))


RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(MOVEMENT, _movement),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **layer_rules.RULES,
    "cat": _cat,
}
