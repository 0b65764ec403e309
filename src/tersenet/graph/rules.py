"""What each operator does to channel labels. An operator without a rule freezes what it reads, with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersenet.graph import contraction_rules, layer_rules, movement_rules, weight_rules
from tersenet.graph.choices import CHOOSING
from tersenet.graph.labels import (
    Labeller,
    Rule,
    Statistic,
    Value,
    Weight,
    array_of,
    axis_vector,
    describe,
    slim,
    spread,
    varying,
)
from tersenet.graph.operators import ELEMENTWISE, FRESH, LAYERS, MULTIPLICATIVE, REDUCTIONS, STATISTICS, SUMS, UNARY
from tersenet.graph.ties import collapse, read_whole
from tersenet.graph.trace import Op, Ref


def apply_rule(run: Labeller, op: Op) -> Any:
    """The value of `op`: labels for tensors that carry channels, a `Weight` for what is computed of parameters."""
    values = run.operands(op)
    if not any(isinstance(r, Ref) for r in _results(op)):
        return None
    held = [v for v in values if isinstance(v, (Value, Weight))]
    if not held or op.name in FRESH:
        return None
    if not any(isinstance(v, Value) for v in held) and op.name not in LAYERS:
        return weight_rules.computed(run, op)
    rule = RULES.get(op.name)
    if rule is None:
        return run.refuse(
            op, f"{describe(op)} {'chooses by its values' if op.name in CHOOSING else 'is not understood'}"
        )
    try:
        return rule(run, op)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
        # What a rule did not foresee must freeze channels, and not end the user's work.
        return run.refuse(op, f"{describe(op)} is not understood ({type(error).__name__}: {str(error)[:80]})")


def _results(op: Op) -> list[Any]:
    return op.result if isinstance(op.result, list) else [op.result]


def _unary(run: Labeller, op: Op) -> Any:
    value = run.get(op.args[0])
    if not isinstance(value, Value):
        return run.refuse(op, f"{describe(op)} has no tensor input")
    return [value] * len(op.result) if isinstance(op.result, list) else value


def _restrided(run: Labeller, op: Op) -> Any:
    """Another memory order of the same tensor, as pooling to one pixel makes it."""
    value = run.get(op.args[0])
    if tuple(op.args[1]) != run.shape(op.args[0]):
        return run.refuse(op, f"{describe(op)} is not understood")
    return value


def _along(run: Labeller, op: Op) -> Any:
    """Softmax, cumulative sums, sorting: free along places, forbidden along channels, tied where there are groups."""
    value: Value = run.get(op.args[0])
    axis = op.args[1] if len(op.args) > 1 else -1
    labels = value.labels
    axis = axis % labels.dim()
    axes = varying(labels)
    if axis in axes:
        if axes == [axis]:
            return run.refuse(op, f"{describe(op)} works along channels")
        labels = collapse(run, labels, [axis])
    result = Value(labels, value.origin, value.weighs)
    return [result] * len(op.result) if isinstance(op.result, list) else result


def _reduction(run: Labeller, op: Op) -> Any:
    """Over axes along which the labels don't change, a reduction keeps them; over channels it mixes them."""
    value: Value = run.get(op.args[0])
    labels = value.labels
    axes: Any = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
    if op.name == "linalg_vector_norm":
        axes = op.args[2] if len(op.args) > 2 else op.kwargs.get("dim")
    if axes is None or isinstance(axes, bool) or axes == []:
        axes = list(range(labels.dim()))
    axes = sorted(a % labels.dim() for a in ([axes] if isinstance(axes, int) else axes))
    mixed = [a for a in varying(labels) if a in axes]
    if mixed == varying(labels) and mixed:
        if len(mixed) > 1 or op.name not in SUMS | STATISTICS:
            return run.refuse(op, f"{describe(op)} reduces over channels")
        vector = array_of(labels, mixed)
        if op.name in STATISTICS:
            run.out.statistics.append(Statistic(op.number, mixed[0], vector))
        read_whole(run, op, value, vector, mixed[0])
        labels = torch.zeros(1, dtype=torch.long).expand(labels.shape)
    elif mixed:
        labels = collapse(run, labels, mixed)
    for axis in axes:
        labels = labels.narrow(axis, 0, 1)
    first = _results(op)[0]
    if len(run.shape(first)) < labels.dim():
        for axis in reversed(axes):
            labels = labels.squeeze(axis)
    result = Value(labels, value.origin, value.weighs)
    return [result] * len(op.result) if isinstance(op.result, list) else result


def _elementwise(run: Labeller, op: Op) -> Any:
    shape = run.shape(_results(op)[0])
    refs = [a for a in [*op.args, *op.kwargs.values()] if isinstance(a, Ref)]
    values = [(ref, run.get(ref)) for ref in refs]
    tensors = [v for _, v in values if isinstance(v, Value)]
    if run.residual == "independent" and op.name in ("add", "sub") and _is_residual(tensors):
        return _independent_sum(run, op, tensors)
    origin = frozenset[int]().union(*(v.origin for v in tensors))
    labels = slim(tensors[0].labels.expand(shape))
    weighs = any(v.weighs for v in tensors)
    harmless = weighs or op.name in MULTIPLICATIVE
    for value in tensors[1:]:
        labels = _meet(run, op, labels, slim(value.labels.expand(shape)), harmless)
    for ref, value in values:
        if isinstance(value, Weight):
            labels = weight_rules.attach(run, op, value, labels, origin, harmless)
        elif value is None:
            _constant_operand(run, op, run.shape(ref), labels)
    if op.name in MULTIPLICATIVE:
        shifted = all(v.shifted for v in tensors)
    else:
        numbers = [a for a in op.args if isinstance(a, (int, float)) and a]
        shifted = any(v.shifted for v in tensors) or bool(numbers) or any(not isinstance(v, Value) for _, v in values)
    return Value(labels, origin, weighs, shifted)


def _meet(run: Labeller, op: Op, a: Tensor, b: Tensor, harmless: bool) -> Tensor:
    """Two label tensors of one shape that are combined; the labels of the result."""
    if len(varying(a)) < len(varying(b)):
        a, b = b, a
    wide, narrow = varying(a), varying(b)
    if not set(narrow) <= set(wide):
        for labels in (a, b):
            run.freeze(labels, f"{describe(op)} combines channels along two axes")
        return a
    if wide and not narrow:
        # One value for all channels. A product with it keeps what is zero; a sum does not.
        run.freeze(b, f"{describe(op)} broadcasts it over channels")
        if not harmless:
            run.freeze(a, f"{describe(op)} combines it with one value for all channels")
        return a
    left, right = array_of(a, wide).reshape(-1), array_of(b.expand(a.shape), wide).reshape(-1)
    run.merge(left, right)
    if not harmless:
        run.freeze(left[right == 0], f"{describe(op)} combines it with values that have no channel")
        run.freeze(right[left == 0], f"{describe(op)} combines it with values that have no channel")
    return a if (left != 0).all() else torch.where(a == 0, b, a)


def _constant_operand(run: Labeller, op: Op, shape: tuple[int, ...], labels: Tensor) -> None:
    """A tensor made in forward, or kept outside the network's parameters: it does not shrink."""
    offset = labels.dim() - len(shape)
    if any(axis >= offset and shape[axis - offset] > 1 for axis in varying(labels)):
        run.freeze(labels, f"{describe(op)} combines it with a tensor of fixed size")


def _is_residual(tensors: list[Value]) -> bool:
    if len(tensors) != 2 or tensors[0].labels.shape != tensors[1].labels.shape:
        return False
    a, b = (axis_vector(t.labels, 1) if t.labels.dim() > 1 else None for t in tensors)
    return a is not None and b is not None and not np.array_equal(a, b)


def _independent_sum(run: Labeller, op: Op, tensors: list[Value]) -> Value:
    """The trunk keeps its full width; each summand is put back at its own channels before the sum."""
    for value in tensors:
        vector = axis_vector(value.labels, 1)
        if vector is not None:
            run.out.scatters.append((vector, value.origin, describe(op)))
    shape = run.shape(op.result)
    trunk = run.fresh(shape[1])
    run.freeze(trunk, f"the residual trunk keeps its full width at {describe(op)}")
    return Value(spread(trunk, shape), frozenset[int]().union(*(t.origin for t in tensors)))


RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys("_softmax _safe_softmax _log_softmax cumsum sort flip_sort".split(), _along),
    "as_strided": _restrided,
    **movement_rules.RULES,
    **layer_rules.RULES,
    **contraction_rules.RULES,
}
