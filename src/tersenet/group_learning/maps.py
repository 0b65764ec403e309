"""Kernel norms in the order of their channels, made small enough for a report, and when they are looked at."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tersenet.ops.group_levels import Matrix
from tersenet.results import GroupMap

CELLS = 16
_TIMES, _MOST = 5, 300
"""How often each layer is shown: before training, in the end and between; fewer times beyond so many maps."""


def times(layers: int, epochs: int) -> frozenset[int]:
    """After how many epochs maps are made, the last time left out: it is for whoever decides on the groups."""
    count = max(2, min(_TIMES, _MOST // max(1, layers)))
    return frozenset(epochs * k // (count - 1) for k in range(count - 1))


def group_map(name: str, epoch: int, S: Matrix, groups: int, inside: float) -> GroupMap:
    """What the report shows of one layer at one time.

    Args:
        epoch: after how many epochs.
        S: (C_out, C_in) kernel norms, in the learned order.
        groups: how many blocks are drawn around them.
        inside: the norm that lies in these blocks.
    """
    whole = float(S.sum())
    return GroupMap(
        name=name, epoch=epoch, groups=groups, kept=inside / whole if whole > 0 else 1.0, cells=list(_texts(_cells(S)))
    )


def _cells(S: Matrix) -> Matrix:
    """The mean of S in each of at most CELLS x CELLS cells."""
    cells = S
    for axis, size in enumerate(S.shape):
        starts = np.arange(min(size, CELLS)) * size // min(size, CELLS)
        lengths = np.diff([*starts.tolist(), size])
        cells = np.add.reduceat(cells, starts, axis=axis) / np.expand_dims(lengths, 1 - axis)
    return cells


def _texts(cells: Matrix) -> Iterable[str]:
    digits = np.rint(15 * cells / max(float(cells.max()), 1e-30)).astype(np.int64)
    return ("".join(f"{digit:x}" for digit in row) for row in digits.tolist())
