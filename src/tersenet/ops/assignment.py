"""The cheapest way to give every channel a place, where places come in blocks of equal cost. Exact."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tersenet.ops.group_levels import Matrix

IntArray = NDArray[np.int64]


def inverse(permutation: IntArray) -> IntArray:
    """Where each channel is, of the channel at each place; and back."""
    found = np.empty_like(permutation)
    found[permutation] = np.arange(len(permutation))
    return found


def assigned(costs: Matrix) -> tuple[IntArray, float]:
    """The channel at each place, and what that costs.

    The solver, which takes row after row, is some ten times faster with channels in its rows than with places. Places
    of one block are the same to it: it tries them all, over and over, unless prices keep channels out of full blocks.

    Args:
        costs: (channels, blocks), where a channel costs the same at every place of a block. Blocks are equally wide.
    """
    channels, blocks = costs.shape
    width = channels // blocks
    # The same amount off every channel's cost at a place leaves the best order what it is.
    each = costs if width == 1 else np.repeat(costs - _prices(costs), width, axis=1)
    order = inverse(np.asarray(linear_sum_assignment(each)[1], dtype=np.int64))
    return order, cost_of(costs, order)


def cost_of(costs: Matrix, order: IntArray) -> float:
    """The cost of this order of the channels."""
    channels, blocks = costs.shape
    return float(costs[order, np.arange(channels) // (channels // blocks)].sum())


def _prices(costs: Matrix) -> Matrix:
    """(blocks,): about what a place in each block is worth. With them taken off, about as many channels are best off in
    each block as it has places.

    The blocks are halved until one is left, or an odd number. The price between two halves is the median of what they
    differ by, over the channels that the halvings before gave them.
    """
    channels, blocks = costs.shape
    halves = blocks & -blocks
    best = [costs.reshape(channels, halves, -1).min(2)]
    while best[0].shape[1] > 1:
        best.insert(0, np.minimum(best[0][:, 0::2], best[0][:, 1::2]))
    prices, parts = np.zeros(1), np.arange(channels)[None, :]
    for table in best[1:]:
        apart = (table[:, 0::2] - table[:, 1::2])[parts, np.arange(len(parts))[:, None]]
        order = np.argsort(apart, axis=1)
        half = parts.shape[1] // 2
        middle = np.take_along_axis(apart, order[:, half - 1 : half + 1], 1).mean(1) / 2
        prices = np.repeat(prices, 2) + np.stack([middle, -middle], axis=1).ravel()
        parts = np.take_along_axis(parts, order, 1).reshape(-1, half)
    return np.repeat(prices, blocks // halves)
