"""The order of a convolution's channels that brings its large kernels together in blocks, by exact assignment.

Minimises <S[rows][:, columns], R> over both permutations. Alternating between the two, each is a linear assignment
problem, which is solved exactly; the cost never rises. Both at once would be NP-hard.

Source: Zhang et al., arXiv 2002.08127, section 3.2 (an optimal transport with unit marginals, whose vertices are
    permutations). Differs: an assignment solver in place of a network simplex; a step that gains nothing is not taken,
    so that the order stands still once it is found; rows are carried over too.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tersenet.ops.group_levels import Matrix, block_costs, cost_matrix

IntArray = NDArray[np.int64]
_T = TypeVar("_T", bound=np.generic)
_GAIN = 1e-12
"""Relative gain below which two costs are the same number, rounded."""


@dataclass(frozen=True)
class Order:
    """`rows[a]` is the output channel that comes to place a, `columns[a]` the input channel."""

    rows: IntArray
    columns: IntArray

    @classmethod
    def identity(cls, C_out: int, C_in: int) -> Order:
        return cls(np.arange(C_out), np.arange(C_in))

    def of(self, S: Matrix) -> Matrix:
        """S in this order."""
        return S[np.ix_(self.rows, self.columns)]

    def back(self, table: NDArray[_T]) -> NDArray[_T]:
        """A table over places as one over the original channels: a mask, or what each kernel costs."""
        return table[np.ix_(inverse(self.rows), inverse(self.columns))]


@dataclass(frozen=True)
class Problem:
    """S (C_out, C_in) of kernel norms, the group counts and the decay that make R, and the order to start from."""

    S: Matrix
    counts: tuple[int, ...]
    decay: float
    start: Order

    def cost(self, order: Order) -> float:
        """<S[rows][:, columns], R>."""
        R = cost_matrix(*self.S.shape, self.counts, self.decay)
        return float(np.vdot(order.of(self.S), R))

    def best_rows(self, columns: IntArray) -> tuple[IntArray, float]:
        """The rows' best order for fixed columns, and its cost."""
        return self._assigned(self.S[:, columns])

    def best_columns(self, rows: IntArray) -> tuple[IntArray, float]:
        """The columns' best order for fixed rows, and its cost."""
        return self._assigned(self.S[rows].T)

    def _assigned(self, norms: Matrix) -> tuple[IntArray, float]:
        """The channel at each place, from the cost of every channel (row) at every place (column).

        Places of one block cost the same. The solver, which takes row after row, is some ten times faster with channels
        in its rows than with places.
        """
        blocks = block_costs(norms, self.counts, self.decay)
        cost = np.repeat(blocks, len(blocks) // blocks.shape[1], axis=1)
        channels, places = linear_sum_assignment(cost)
        return inverse(np.asarray(places, dtype=np.int64)), float(cost[channels, places].sum())


def inverse(permutation: IntArray) -> IntArray:
    found = np.empty_like(permutation)
    found[permutation] = np.arange(len(permutation))
    return found


def improved(problem: Problem, rounds: int) -> Order:
    """At most `rounds` alternations, rows before columns, until neither gains any more. Deterministic."""
    order = problem.start
    if len(problem.counts) == 1:
        return order
    cost = problem.cost(order)
    for _ in range(rounds):
        before = cost
        for side in ("rows", "columns"):
            if side == "rows":
                rows, new = problem.best_rows(order.columns)
                trial = Order(rows, order.columns)
            else:
                columns, new = problem.best_columns(order.rows)
                trial = Order(order.rows, columns)
            if new < cost - _GAIN * abs(cost):
                order, cost = trial, new
        if cost == before:
            break
    return order


def improved_all(
    problems: Mapping[str, Problem], rounds: int, restarts: int = 0, seed: int = 0, threads: int | None = None
) -> dict[str, Order]:
    """`improved` for every layer, in threads (the solver runs without the interpreter's lock).

    Args:
        restarts: so many random orders of the columns to start from beside the given one; the best end counts. What
            they draw depends on `seed` and the layer's place only.
        threads: by default a few more than there are cores.
    """

    def solve(job: tuple[int, Problem]) -> Order:
        number, problem = job
        best = improved(problem, rounds)
        random = np.random.default_rng([seed, number])
        for _ in range(restarts if len(problem.counts) > 1 else 0):
            start = Order(problem.start.rows, random.permutation(problem.S.shape[1]))
            other = improved(replace(problem, start=start), rounds)
            cost = problem.cost(best)
            if problem.cost(other) < cost - _GAIN * abs(cost):
                best = other
        return best

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(problems, pool.map(solve, enumerate(problems.values())), strict=True))
