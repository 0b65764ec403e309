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
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tersenet.ops.group_levels import Matrix

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
    """S (C_out, C_in) of kernel norms, R of costs of the same shape, and the order to start from."""

    S: Matrix
    R: Matrix
    start: Order


def inverse(permutation: IntArray) -> IntArray:
    found = np.empty_like(permutation)
    found[permutation] = np.arange(len(permutation))
    return found


def cost_of(S: Matrix, R: Matrix, order: Order) -> float:
    """<S[rows][:, columns], R>."""
    return float(np.vdot(order.of(S), R))


def best_rows(S: Matrix, R: Matrix, columns: IntArray) -> IntArray:
    """The rows' best order for fixed columns."""
    return _assigned(S[:, columns] @ R.T)


def best_columns(S: Matrix, R: Matrix, rows: IntArray) -> IntArray:
    """The columns' best order for fixed rows."""
    return _assigned(S[rows].T @ R)


def _assigned(cost: Matrix) -> IntArray:
    """The channel at each place, from the cost of every channel (row) at every place (column).

    Places of one block cost the same. The solver, which takes row after row, is some ten times faster with channels in
    its rows than with places.
    """
    return inverse(np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64))


def improved(problem: Problem, rounds: int) -> Order:
    """At most `rounds` alternations, rows before columns, until neither gains any more. Deterministic."""
    S, R, order = problem.S, problem.R, problem.start
    if not R.any():
        return order
    cost = cost_of(S, R, order)
    for _ in range(rounds):
        before = cost
        for side in ("rows", "columns"):
            if side == "rows":
                trial = Order(best_rows(S, R, order.columns), order.columns)
            else:
                trial = Order(order.rows, best_columns(S, R, order.rows))
            new = cost_of(S, R, trial)
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
        for _ in range(restarts if problem.R.any() else 0):
            start = Order(problem.start.rows, random.permutation(problem.S.shape[1]))
            other = improved(Problem(problem.S, problem.R, start), rounds)
            cost = cost_of(problem.S, problem.R, best)
            if cost_of(problem.S, problem.R, other) < cost - _GAIN * abs(cost):
                best = other
        return best

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(problems, pool.map(solve, enumerate(problems.values())), strict=True))
