"""Which channels go together so that operators that take channels apart by place still take the same ones.

Python computes the sizes of chunks, strided slices and channel shuffles from the number of channels that are left. The
result holds the right channels only if every block lost the same places; so these places are tied. Where no tie can
help (the first three channels, channel 7), the whole axis is frozen.

That the numbers are computed, and not fixed in forward, can't be seen in a trace: `compact` finds out by running.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from tersenet.graph.labels import IntArray, Labeller, compressed, describe

_SPLITS = frozenset("split split_with_sizes chunk unbind".split())
_PICKS = frozenset("slice narrow select index_select roll channel_shuffle".split())


def tie_regrouped(run: Labeller, node: Node, name: str, labels: Tensor, results: list[Tensor]) -> None:
    """Merge or freeze the channels of `labels`, which the operator `name` turned into `results`."""
    if len(_varying(labels)) != 1:
        return
    vector = _sequence(labels)
    if name in _SPLITS or name in _PICKS:
        pieces = [_sequence(result) for result in results]
        if all(np.array_equal(piece, vector) for piece in pieces):
            return
        table = _blocks(node, name, vector, pieces)
        if table is None:
            run.freeze(vector, f"{describe(node)} takes channels by their numbers")
            return
        _tie_rows(run, table)
    elif len(results) == 1 and len(_varying(results[0])) == 2:
        rows = results[0].shape[_varying(results[0])[0]]
        if np.array_equal(_sequence(results[0]), vector):
            _tie_rows(run, vector.reshape(rows, -1))


def _blocks(node: Node, name: str, vector: IntArray, pieces: list[IntArray]) -> IntArray | None:
    """(blocks, places): entries of one column are kept or removed together. None: there is no such rule."""
    n, m = len(vector), len(pieces[0])
    if name in _SPLITS:
        return np.stack(pieces) if m > 1 and all(len(piece) == m for piece in pieces) else None
    if name == "channel_shuffle":
        groups: Any = node.args[1]
        return vector.reshape(groups, -1)
    if name in ("slice", "narrow"):
        step: Any = node.args[4] if name == "slice" and len(node.args) > 4 else 1
        if step > 1:
            return vector.reshape(-1, step).T if n % step == 0 else None
        if m > 1 and n % m == 0:
            table = vector.reshape(-1, m)
            return table if any(np.array_equal(row, pieces[0]) for row in table) else None
    return None


def _tie_rows(run: Labeller, table: IntArray) -> None:
    for row in table[1:]:
        run.merge(table[0], row)


def _varying(labels: Tensor) -> list[int]:
    """The axes along which the labels change."""
    small, found = compressed(labels), list[int]()
    for axis in range(small.dim()):
        if small.shape[axis] == 0:
            return []
        first = small.narrow(axis, 0, 1)
        if bool((small == first).all()):
            small = first
        else:
            found.append(axis)
    return found


def _sequence(labels: Tensor) -> IntArray:
    """The labels with every axis along which they don't change cut to one entry, in order."""
    small = labels
    for axis in set(range(labels.dim())) - set(_varying(labels)):
        small = small.narrow(axis, 0, min(1, small.shape[axis]))
    return small.reshape(-1).numpy().copy()
