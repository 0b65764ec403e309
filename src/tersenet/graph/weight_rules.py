"""Parameters that are computed with in forward: standardised and normalised weights, gates, bias tables, class tokens.

Every axis of a parameter has labels of its own. They are moved along with it, and tied to the channels that it meets.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tersenet.graph.labels import (
    End,
    Key,
    Labeller,
    Statistic,
    Weight,
    array_of,
    describe,
    slim,
    varying,
)
from tersenet.graph.operators import ELEMENTWISE, MOVEMENT, REDUCTIONS, UNARY
from tersenet.graph.ties import collapse
from tersenet.graph.trace import Op, Ref

_SIZES = ("num_features", "num_channels", "num_parameters")


def computed(run: Labeller, op: Op) -> Any:
    """The `Weight` that `op` makes of parameters and constants. Axes that it mixes are lost: they can't be cut then."""
    refs = op.result if isinstance(op.result, list) else [op.result]
    shape = run.shape(refs[0])
    held = [(ref, run.get(ref)) for ref in _refs([*op.args, *op.kwargs.values()])]
    axes: dict[Key, Tensor] = {}
    if op.name in ELEMENTWISE or op.name in UNARY:
        for _, weight in held:
            if isinstance(weight, Weight):
                _join(run, op, axes, {k: slim(v.expand(shape)) for k, v in weight.axes.items()})
    elif op.name in REDUCTIONS:
        axes = _reduce(run, op, held[0][1], shape)
    elif op.name in MOVEMENT or op.name == "cat":
        return _moved(run, op)
    elif op.name == "native_batch_norm":
        axes = _standardised(run, op, held)
    elif op.name == "_weight_norm_interface":
        axes = _weight_norm(run, op, held)
    if not axes:
        for _, weight in held:
            for labels in weight.axes.values() if isinstance(weight, Weight) else ():
                run.freeze(labels, f"{describe(op)} computes with parameters in a way that is not understood")
    if not isinstance(op.result, list):
        return Weight(shape, axes)
    return [Weight(shape, axes), *(Weight(run.shape(r), {}) for r in refs[1:])]


def _refs(args: Any) -> list[Ref]:
    if isinstance(args, Ref):
        return [args]
    return [r for a in args for r in _refs(a)] if isinstance(args, list) else []


def _join(run: Labeller, op: Op, axes: dict[Key, Tensor], more: dict[Key, Tensor]) -> None:
    """Two parameters that are combined: axes that lie along each other are tied."""
    for key, labels in more.items():
        along = varying(labels)
        for other, theirs in axes.items():
            if along and other != key and varying(theirs) == along:
                run.merge(array_of(theirs, along).reshape(-1), array_of(labels, along).reshape(-1))
                record(run, op, key, role="consume")
                record(run, op, other, role="consume")
    axes.update(more)


def _reduce(run: Labeller, op: Op, weight: Weight, shape: tuple[int, ...]) -> dict[Key, Tensor]:
    place = 2 if op.name == "linalg_vector_norm" else 1
    dims = op.args[place] if len(op.args) > place else op.kwargs.get("dim")
    rank = len(weight.shape)
    dims = list(range(rank)) if dims in (None, []) or isinstance(dims, bool) else dims
    dims = sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims))
    axes: dict[Key, Tensor] = {}
    for key, labels in weight.axes.items():
        along = varying(labels)
        mixed = [a for a in along if a in dims]
        if mixed:
            _statistic(run, op, mixed[0], labels)
            continue
        for axis in dims:
            labels = labels.narrow(axis, 0, 1)
        if len(shape) < rank:
            for axis in reversed(dims):
                labels = labels.squeeze(axis)
        axes[key] = labels
    return axes


def _statistic(run: Labeller, op: Op, axis: int, labels: Tensor) -> None:
    along = varying(labels)
    if along == [axis]:
        run.out.statistics.append(Statistic(op.number, axis, array_of(labels, along)))
    else:
        run.freeze(labels, f"{describe(op)} takes a statistic over several axes")


def _moved(run: Labeller, op: Op) -> Any:
    """The operator run on the labels of every axis by itself; 0 where another tensor is."""
    from tersenet.graph.movement_rules import move

    refs = op.result if isinstance(op.result, list) else [op.result]
    keys = {k: None for ref in _refs(list(op.args)) if isinstance(run.get(ref), Weight) for k in run.get(ref).axes}
    found: list[dict[Key, Tensor]] = [{} for _ in refs]
    for key in keys:

        def labels_of(ref: Ref, key: Key = key) -> Tensor:
            weight = run.get(ref)
            held = weight.axes.get(key) if isinstance(weight, Weight) else None
            return held if held is not None else torch.zeros(1, dtype=torch.long).expand(run.shape(ref))

        moved = move(run, op, labels_of)
        for axes, labels in zip(found, moved or [], strict=False):
            axes[key] = labels
    held = [run.get(ref) for ref in _refs(list(op.args))]
    same = all(weight.moved for weight in held if isinstance(weight, Weight))
    results = [Weight(run.shape(ref), axes, moved=same) for ref, axes in zip(refs, found, strict=True)]
    return results if isinstance(op.result, list) else results[0]


def _standardised(run: Labeller, op: Op, held: list[tuple[Ref, Any]]) -> dict[Key, Tensor]:
    """Batch norm over a weight, as scaled standardised convolutions use it: statistics over its input channels."""
    weight: Weight = held[0][1]
    axes = {}
    for key, labels in weight.axes.items():
        along = varying(labels)
        if along and along != [1]:
            _statistic(run, op, along[0], labels)
        axes[key] = labels
    for _, scale in held[1:]:
        if isinstance(scale, Weight):
            shape = (1, -1, *[1] * (len(weight.shape) - 2))
            along = {k: v.reshape(shape).expand(weight.shape) for k, v in scale.axes.items() if varying(v)}
            _join(run, op, axes, along)
    return axes


def _weight_norm(run: Labeller, op: Op, held: list[tuple[Ref, Any]]) -> dict[Key, Tensor]:
    direction, scale = held[0][1], held[1][1]
    dim = op.args[2] if len(op.args) > 2 else 0
    axes: dict[Key, Tensor] = {}
    for key, labels in direction.axes.items():
        along = varying(labels)
        if along and along != [dim]:
            _statistic(run, op, along[0], labels)
        axes[key] = labels
    lengths = {k: v.expand(direction.shape) for k, v in scale.axes.items() if varying(v)}
    _join(run, op, axes, lengths)
    # A filter is zeroed by its length: a direction of zeros has no norm to be divided by.
    return lengths | axes


def record(
    run: Labeller, op: Op, key: Key, origin: frozenset[int] = frozenset(), role: Literal["pass", "consume"] = "pass"
) -> int:
    """The end of a parameter axis that is tied to channels. As `consume` it is cut, but never set to zero."""
    name, axis = key
    owner = name.rpartition(".")[0]
    labels = run.axis_labels(name, axis, 0)
    holders = vars(run.modules[owner]) if owner in run.modules else {}
    sizes = tuple((owner, s) for s in _SIZES if holders.get(s) == len(labels))
    return run.end(End(role, owner, (name,), axis, labels, [op.number], sizes, origin))


def attach(run: Labeller, op: Op, weight: Weight, labels: Tensor, origin: frozenset[int], harmless: bool) -> Tensor:
    """Tie a parameter to the channels of an activation that it meets; returns the activation's labels.

    `harmless`: channels that are zero stay so even if they meet the same values as others (a product, a map).
    """
    axes = varying(labels)
    met = False
    for key, own in weight.axes.items():
        own = slim(own.expand(labels.shape))
        along = varying(own)
        if not along or not set(along) & set(axes):
            continue
        met = True
        if along[-1] == axes[-1] and len(along) < len(axes):
            # One entry for a place in every head: heads go as a whole, and it stays.
            labels = collapse(run, labels, along)
            continue
        if not set(along) <= set(axes):
            run.freeze(labels, f"{describe(op)} combines channels with a parameter along two axes")
            continue
        run.merge(array_of(labels, axes).reshape(-1), array_of(own, axes).reshape(-1))
        record(run, op, key, origin)
    wide = max(weight.shape, default=1) > 1
    if axes and not met and wide and not harmless:
        run.freeze(labels, f"{describe(op)} combines it with a parameter that all channels share")
    return labels


def carrying(run: Labeller, weight: Weight, axis: int) -> list[Key]:
    """The parameter axes that lie along `axis` of a weight."""
    axis %= len(weight.shape)
    if weight.name is not None:
        return [(weight.name, axis)]
    keys = [key for key, labels in weight.axes.items() if varying(labels) == [axis]]
    if not keys and weight.shape[axis] == 1:
        keys = [key for key, labels in weight.axes.items() if not varying(labels) and key[1] < 2][:1]
    return keys


def along(weight: Weight, key: Key, axis: int) -> Any:
    """The labels of a parameter axis along `axis` of a weight."""
    return array_of(weight.axes[key], [axis % len(weight.shape)])
