"""How many units each item keeps within a budget: where the measured error rises least for what it saves.

Every item's error is replaced by its lower convex envelope, and units go one step at a time from the item with the
least rise per MAC (or parameter) saved. Savings shrink as other items shrink, so that a queue of old ratios is enough.

Source: Shoham and Gersho, Efficient Bit Allocation for an Arbitrary Set of Quantizers, 1988 (the greedy on envelopes).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tersenet.calibration.items import Counts
from tersenet.errors import TersenetError
from tersenet.graph.budget import USED_UP, Rounding
from tersenet.recipe_target import Target

Curves = dict[str, NDArray[np.float64]]
"""Item -> (size + 1,) error with 0, 1, ... units left."""


class Sized(Protocol):
    """Something of which 1 to `size` units, or ranks, can be left."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...


class Costs(Protocol):
    """What the network costs with (items,) numbers left. It must not fall with any of them."""

    @property
    def items(self) -> Sequence[Sized]: ...

    @property
    def way_out(self) -> str:
        """What to do where a target can't be met."""
        ...

    def __call__(self, left: NDArray[np.int64]) -> int: ...


_LEVELS = 64
_WELL_USED = 0.99  # share of a budget below which what is left of it is large


def uniform(sizes: Mapping[str, int], rate: float, rounding: Rounding) -> Counts:
    """The same share of every item. The small addend keeps 10 * 0.3 whole."""
    return {name: rounding.left(size, size - int(size * rate + 1e-9)) for name, size in sizes.items()}


def uniform_within(costs: Costs, target: Target, original: int, rounding: Rounding, fixed: Counts) -> Counts:
    """The same share of every item that is not `fixed`, as large as the target allows.

    Raises:
        TersenetError: a target that can't be met.
    """
    sizes = {item.name: item.size for item in costs.items if item.name not in fixed}
    limit = target.limit(original)

    def at(rate: float) -> Counts:
        return fixed | uniform(sizes, rate, rounding)

    rates = sorted({gone / size for size in sizes.values() for gone in range(size)}) or [0.0]
    _check(costs, at(1.0), target, limit, original)
    low, high = 0, len(rates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if costs(_row(costs, at(rates[middle]))) <= limit else (middle + 1, high)
    curves = {name: np.linspace(1, 0, size + 1) ** 2 for name, size in sizes.items()}
    return _given_back(costs, _row(costs, at(rates[low])), curves, limit, rounding)


def allocate(costs: Costs, curves: Curves, target: Target, original: int, rounding: Rounding, fixed: Counts) -> Counts:
    """Counts of the least total error that meet the target.

    Raises:
        TersenetError: a target that can't be met.
    """
    limit = target.limit(original)
    floor = fixed | {n: rounding.left(len(curve) - 1, 1) for n, curve in curves.items()}
    _check(costs, floor, target, limit, original)
    left = _row(costs, {item.name: fixed.get(item.name, item.size) for item in costs.items})
    levels = {i: _levels(item.size, rounding) for i, item in enumerate(costs.items) if item.name in curves}
    hulls = {i: _envelope(curves[costs.items[i].name], steps) for i, steps in levels.items()}
    at = dict.fromkeys(levels, 0)

    def step(i: int) -> tuple[float, int]:
        """What is lost for what the next step of a layer saves, and where it leads. A step that saves nothing, as in
        measured times, is one with the step behind it."""
        fewer, now = left.copy(), costs(left)
        for place in range(at[i] + 1, len(levels[i])):
            fewer[i] = levels[i][place]
            saved = now - costs(fewer)
            if saved > 0:
                return (hulls[i][place] - hulls[i][at[i]]) / saved, place
        return math.inf, at[i]

    queue = [(step(i)[0], i) for i in levels]
    heapq.heapify(queue)
    while costs(left) > limit and queue:
        _, i = heapq.heappop(queue)
        now, place = step(i)
        if math.isinf(now):
            continue
        if queue and now > queue[0][0]:
            heapq.heappush(queue, (now, i))
            continue
        at[i] = place
        left[i] = levels[i][place]
        heapq.heappush(queue, (step(i)[0], i))
    if costs(left) > limit:
        # Steps that save nothing by themselves ended the descent before the floor: take the floor, and give back.
        left = _row(costs, floor)
    return _given_back(costs, left, curves, limit, rounding)


def _given_back(costs: Costs, left: NDArray[np.int64], curves: Curves, limit: int, rounding: Rounding) -> Counts:
    """The same with more units, until the budget is used up.

    Where none fits into a large rest any more, one item gives up a step, if others can use more than it frees.
    """
    places = [i for i, item in enumerate(costs.items) if item.name in curves]
    best = _filled(costs, left, curves, limit, rounding, places)

    def worth(row: NDArray[np.int64]) -> tuple[float, float]:
        return min(costs(row), _WELL_USED * limit), -sum(float(curves[costs.items[i].name][row[i]]) for i in places)

    if costs(best) < _WELL_USED * limit:
        rows = [best]
        for i in places:
            fewer = rounding.left(costs.items[i].size, (int(best[i]) - 1) // rounding.multiple * rounding.multiple)
            if 0 < fewer < best[i]:
                row = best.copy()
                row[i] = fewer
                rows.append(_filled(costs, row, curves, limit, rounding, [j for j in places if j != i]))
        best = max(rows, key=worth)
    return {item.name: int(count) for item, count in zip(costs.items, best, strict=True)}


def _filled(
    costs: Costs, left: NDArray[np.int64], curves: Curves, limit: int, rounding: Rounding, places: list[int]
) -> NDArray[np.int64]:
    """More units of the items at `places`, those first that lower the error most for their cost."""
    used = costs(left)
    while used < USED_UP * limit:
        best: tuple[float, NDArray[np.int64], int] | None = None
        for i in places:
            size = costs.items[i].size
            if left[i] >= size:
                continue
            more = left.copy()
            more[i] = rounding.left(size, int(left[i]) + 1)
            cost = costs(more)
            curve = curves[costs.items[i].name]
            gain = float(curve[left[i]] - curve[more[i]]) / max(cost - used, 1)
            if cost <= limit and (best is None or gain > best[0]):
                best = (gain, more, cost)
        if best is None:
            break
        _, left, used = best
    return left


def _row(costs: Costs, left: Mapping[str, int]) -> NDArray[np.int64]:
    return np.array([left[item.name] for item in costs.items], dtype=np.int64)


def _levels(size: int, rounding: Rounding) -> list[int]:
    """Numbers of units to step through, from all to the fewest."""
    wanted = np.unique(np.linspace(size, 1, min(size, _LEVELS)).round().astype(int))
    return sorted({rounding.left(size, int(count)) for count in wanted}, reverse=True)


def _envelope(curve: NDArray[np.float64], levels: list[int]) -> NDArray[np.float64]:
    """The lower convex envelope of a curve at its `levels` (decreasing), in their order."""
    hull: list[tuple[int, float]] = []
    for x in levels:
        y = float(curve[x])
        while len(hull) > 1 and (y - hull[-1][1]) * (hull[-2][0] - x) <= (y - hull[-2][1]) * (hull[-1][0] - x):
            hull.pop()
        hull.append((x, y))
    xs, ys = zip(*reversed(hull), strict=True)
    return np.interp(levels, xs, ys)


def _check(costs: Costs, floor: Counts, target: Target, limit: int, original: int) -> None:
    smallest = costs(_row(costs, floor))
    if smallest > limit:
        raise TersenetError(
            f"target {target.kind} <= {limit:,} can't be met: with the selected layers at their smallest {smallest:,} "
            f"are left of {original:,}. {costs.way_out}"
        )
