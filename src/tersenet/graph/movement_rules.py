"""Operators that only move values run themselves on the labels.

Python computes the sizes of chunks, strided slices, heads and channel shuffles from the number of channels that are
left. The result holds the right channels only if what is left is again a table of whole rows and columns: such tables
are noted, and settled when everything that ties channels is known. Where no table can help (channel 7), the channels
are frozen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersenet.graph.edits import is_size
from tersenet.graph.labels import (
    IntArray,
    Labeller,
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
from tersenet.graph.operators import MOVEMENT
from tersenet.graph.statements import attributes_at
from tersenet.graph.trace import Op, Ref

_SPLITS = frozenset("split split_with_sizes chunk unbind".split())
_VIEWS = frozenset("view _unsafe_view _reshape_alias reshape".split())
_PICKS = frozenset("slice narrow select index_select index roll channel_shuffle native_channel_shuffle".split())


def move(run: Labeller, op: Op, arg: Any) -> list[Tensor] | None:
    """The operator run on label tensors: `arg` turns an argument into one. None: an index that is computed."""
    args: list[Any] = [_real(run, a) if isinstance(a, Ref) and arg(a) is None else _open(a, arg) for a in op.args]
    kwargs = {k: _open(a, arg) for k, a in op.kwargs.items()}
    if any(a is None and isinstance(b, Ref) for a, b in zip(args, op.args, strict=True)):
        return None
    if op.name == "index":
        where = _where(run, op.args[1], args[0])
        if where is None:
            return None
        args[1] = where
    if op.name in _VIEWS:
        result: Any = args[0].reshape(run.shape(op.result))
    elif op.name == "index":
        result = op.func(*args).expand(run.shape(op.result))
    else:
        result = op.func(*args, **kwargs)
    return [slim(r) for r in (result if isinstance(result, (list, tuple)) else [result])]


def _where(run: Labeller, indices: list[Any], labels: Tensor) -> list[Any] | None:
    """The indices with which labels are taken. Along axes on which the labels don't change, any place does, also where
    the network chooses by values. None: an axis of channels is indexed by what the network computes."""
    where: list[Any] = []
    axis = 0
    axes = varying(labels)
    for ref in indices:
        if ref is None:
            where.append(None)
            axis += 1
            continue
        slot = run.slot(ref)
        content = _real(run, ref)
        rank = len(slot.shape)
        mask = slot.mask and rank > 0
        taken = range(axis, axis + (rank if mask else 1))
        axis = taken.stop
        if set(taken) & set(axes):
            if content is None:
                return None
            where.append(content)
        else:
            where += [torch.zeros([1] * (1 if mask else rank), dtype=torch.long)] * len(taken)
    return where


def _index_put(run: Labeller, op: Op) -> Any:
    """Rows written into a tensor at places on its first axes: the channels, on the others, are the same in both."""
    target, rows, indices = run.get(op.args[0]), run.get(op.args[2]), op.args[1]
    if not isinstance(rows, Value) or isinstance(target, Weight) or None in indices:
        return run.refuse(op, f"{describe(op)} writes in a way that is not understood")
    shape = run.shape(op.result)
    taken = sum(len(run.shape(ref)) if run.slot(ref).mask else 1 for ref in indices)
    rest = len(shape) - taken
    labels = rows.labels
    if any(axis < labels.dim() - rest for axis in varying(labels)):
        return run.refuse(op, f"{describe(op)} writes channels to places")
    while labels.dim() > rest:
        labels = labels.narrow(0, 0, 1).squeeze(0)
    labels = slim(labels.expand(shape))
    origin = rows.origin
    if isinstance(target, Value):
        axes = varying(labels)
        if varying(target.labels) != axes:
            return run.refuse(op, f"{describe(op)} writes channels into what has other ones")
        run.merge(array_of(target.labels, axes).reshape(-1), array_of(labels, axes).reshape(-1))
        origin |= target.origin
    return Value(labels, origin)


def _open(arg: Any, labels_of: Any) -> Any:
    if isinstance(arg, Ref):
        return labels_of(arg)
    return [_open(a, labels_of) for a in arg] if isinstance(arg, list) else arg


def _real(run: Labeller, ref: Ref) -> Tensor | None:
    return run.slot(ref).content if run.get(ref) is None or isinstance(run.get(ref), Weight) else None


def _movement(run: Labeller, op: Op) -> Any:
    if op.name == "stack" and not all(isinstance(v, Value) for v in run.get(op.args[0])):
        return run.refuse(op, f"{describe(op)} joins a constant to channels")
    values = [v for v in run.operands(op) if isinstance(v, Value)]

    def labels_of(ref: Ref) -> Tensor | None:
        held = run.get(ref)
        return held.labels if isinstance(held, Value) else None

    moved = move(run, op, labels_of)
    if moved is None:
        return run.refuse(op, f"{describe(op)} has a computed index")
    value = run.get(op.args[0])
    if isinstance(value, Value):
        moved = _regroup(run, op, value.labels, moved)
    origin = frozenset[int]().union(*(v.origin for v in values))
    weighs, shifted = (any(getattr(v, name) for v in values) for name in ("weighs", "shifted"))
    results = [Value(labels, origin, weighs, shifted) for labels in moved]
    return results if isinstance(op.result, list) else results[0]


def _regroup(run: Labeller, op: Op, labels: Tensor, results: list[Tensor]) -> list[Tensor]:
    """Note the table that must stay whole for `op`, or freeze the channels."""
    axes = varying(labels)
    if op.name in _SPLITS or op.name in _PICKS:
        pieces = [_sequence(result) for result in results]
        whole = _sequence(labels)
        if all(np.array_equal(piece, whole) for piece in pieces):
            return results
        if len(axes) == 1:
            _take_apart(run, op, array_of(labels, axes), pieces)
        elif op.name in ("unbind", "select", "split", "slice", "chunk", "split_with_sizes"):
            taken = (op.args[1] if len(op.args) > 1 else 0) if op.name in ("unbind", "select") else _axis(op)
            free = tuple(i for i, axis in enumerate(axes) if axis != taken % labels.dim())
            run.table(array_of(labels, axes), free, op)
        else:
            run.freeze(labels, f"{describe(op)} takes channels by their numbers")
    elif len(axes) == 1 and len(results) == 1:
        parts = varying(results[0])
        table = array_of(results[0], parts)
        if len(parts) > 1 and np.array_equal(table.reshape(-1), array_of(labels, axes)):
            run.table(table, tuple(range(len(parts))), op)
    return results


def _axis(op: Op) -> int:
    place = {"split": 2, "split_with_sizes": 2, "chunk": 2}.get(op.name, 1)
    return op.args[place] if len(op.args) > place else op.kwargs.get("dim", 0)


def _take_apart(run: Labeller, op: Op, vector: IntArray, pieces: list[IntArray]) -> None:
    n, m = len(vector), len(pieces[0])
    if op.name in _SPLITS:
        if all(len(piece) == m for piece in pieces) and m > 1:
            run.table(np.stack(pieces), (1,), op)
            return
        if op.name in ("split", "split_with_sizes"):
            return
    elif op.name.endswith("channel_shuffle"):
        run.table(vector.reshape(op.args[1], -1), (1,), op)
        return
    elif op.name in ("slice", "narrow"):
        step = op.args[4] if op.name == "slice" and len(op.args) > 4 else 1
        if step > 1 and n % step == 0:
            run.table(vector.reshape(-1, step), (0,), op)
            return
        if step == 1 and m > 1 and n % m == 0 and not _kept_in_attribute(run, op):
            table = vector.reshape(-1, m)
            if any(np.array_equal(row, pieces[0]) for row in table):
                run.table(table, (1,), op)
                return
        if step == 1:
            return
    run.freeze(vector, f"{describe(op)} takes channels by their numbers")


def _kept_in_attribute(run: Labeller, op: Op) -> bool:
    """Whether the code at this line takes the number from an attribute, which can be set to any other."""
    holders = vars(run.modules[op.place.module]) if op.place.module in run.modules else {}
    numbers = [a for a in op.args[2:4] if isinstance(a, int) and a > 0]
    return any(holders.get(name) in numbers for name in attributes_at(op.place) if is_size(name))


def _sequence(labels: Tensor) -> IntArray:
    """The labels with every axis along which they don't change cut to one entry, in order."""
    return array_of(labels, varying(labels)).reshape(-1) if labels.numel() else np.zeros(0, dtype=np.int64)


def _cat(run: Labeller, op: Op) -> Any:
    parts = [(ref, run.get(ref)) for ref in op.args[0] if run.shape(ref) != (0,)]
    shape = run.shape(op.result)
    axis = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % len(shape)
    first = next(v for _, v in parts if isinstance(v, Value))
    joined: list[Tensor] = []
    for ref, value in parts:
        if isinstance(value, Value):
            joined.append(value.labels)
            continue
        held = _constant_part(run, op, value, first.labels, axis)
        if held is None:
            return run.refuse(op, f"{describe(op)} joins a constant to channels")
        joined.append(held.expand(run.shape(ref)))
    origin = frozenset[int]().union(*(v.origin for _, v in parts if isinstance(v, Value)))
    axes = varying(joined[0])
    if axes and axis not in axes and all(varying(t) == axes for t in joined):
        # Side by side along another axis than the channels': they have to stay the same channels.
        rows = [array_of(t, axes).reshape(-1) for t in joined]
        for row in rows[1:]:
            run.merge(rows[0], row)
        return Value(joined[0].narrow(axis, 0, 1).expand(shape), origin)
    return Value(slim(_join(joined, axis)), origin)


def _constant_part(run: Labeller, op: Op, value: Any, like: Tensor, axis: int) -> Tensor | None:
    """Labels of a parameter that is joined to an activation (a class token); None for what can't shrink with it."""
    from tersenet.graph.weight_rules import record

    if not isinstance(value, Weight):
        return None
    for key, labels in value.axes.items():
        axes = varying(labels)
        if len(axes) == 1 and axes[0] != axis and axes == varying(like):
            record(run, op, key)
            return labels
    return None


def _join(tensors: list[Tensor], axis: int) -> Tensor:
    out = list(tensors[0].shape)
    out[axis] = sum(t.shape[axis] for t in tensors)
    for other in range(len(out)):
        if other != axis and all(t.stride(other) == 0 for t in tensors):
            tensors = [t.narrow(other, 0, 1) for t in tensors]
    return torch.cat([t.contiguous() for t in tensors], axis).expand(out)


def _pixel_shuffle(run: Labeller, op: Op) -> Any:
    value: Value = run.get(op.args[0])
    vector = axis_vector(value.labels, value.labels.dim() - 3)
    if vector is None:
        return run.refuse(op, f"{describe(op)} works on an axis that holds channels")
    blocks = vector.reshape(-1, op.args[1] ** 2)
    run.table(blocks, (0,), op)
    shape = run.shape(op.result)
    return Value(spread(blocks[:, 0].copy(), shape, len(shape) - 3), value.origin)


def _unfolded(run: Labeller, op: Op) -> Any:
    """Every channel gives `pixels` channels (pixel_unshuffle, im2col), in blocks."""
    value: Value = run.get(op.args[0])
    shape = run.shape(op.result)
    axis = len(shape) - 3 if op.name == "pixel_unshuffle" else len(shape) - 2
    vector = axis_vector(value.labels, value.labels.dim() - 3)
    if vector is None:
        return run.refuse(op, f"{describe(op)} works on an axis that holds channels")
    return Value(spread(np.repeat(vector, shape[axis] // len(vector)), shape, axis), value.origin)


def _folded(run: Labeller, op: Op) -> Any:
    value: Value = run.get(op.args[0])
    shape = run.shape(op.result)
    vector = axis_vector(value.labels, value.labels.dim() - 2)
    if vector is None:
        return run.refuse(op, f"{describe(op)} works on an axis that holds channels")
    blocks = vector.reshape(shape[-3], -1)
    run.table(blocks, (0,), op)
    return Value(spread(blocks[:, 0].copy(), shape, len(shape) - 3), value.origin)


RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVEMENT, _movement),
    "cat": _cat,
    "index_put": _index_put,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _unfolded,
    "im2col": _unfolded,
    "col2im": _folded,
}
