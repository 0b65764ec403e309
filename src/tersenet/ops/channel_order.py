"""The order of a convolution's channels that brings its large kernels together in blocks, by exact assignment.

Minimises <S[rows][:, columns], R> over both permutations. Alternating between the two, each is a linear assignment
problem, which is solved exactly; the cost never rises. Both at once would be NP-hard.

Source: Zhang et al., arXiv 2002.08127, section 3.2 (an optimal transport with unit marginals, whose vertices are
    permutations). Differs: an assignment solver in place of a network simplex; a step that gains nothing is not taken,
    so that the order stands still once it is found; rows are carried over too; sides of several layers can be tied to
    one order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from tersenet.ops.group_levels import Matrix, block_costs, cost_matrix

IntArray = NDArray[np.int64]
Side = Literal["rows", "columns"]
Tie = tuple[tuple[str, Side], ...]
"""Sides of layers, of equal length, that have one order."""
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
        return _assigned(self.costs("rows", Order(self.start.rows, columns)))

    def best_columns(self, rows: IntArray) -> tuple[IntArray, float]:
        """The columns' best order for fixed rows, and its cost."""
        return _assigned(self.costs("columns", Order(rows, self.start.columns)))

    def costs(self, side: Side, order: Order) -> Matrix:
        """(channels, places) of this side: what every channel costs at every place, with the other side in `order`."""
        norms = self.S[:, order.columns] if side == "rows" else self.S[order.rows].T
        blocks = block_costs(norms, self.counts, self.decay)
        # Places of one block cost the same.
        return np.repeat(blocks, len(blocks) // blocks.shape[1], axis=1)


def _assigned(costs: Matrix) -> tuple[IntArray, float]:
    """The channel at each place, and what that costs. The solver, which takes row after row, is some ten times faster
    with channels in its rows than with places."""
    channels, places = linear_sum_assignment(costs)
    return inverse(np.asarray(places, dtype=np.int64)), float(costs[channels, places].sum())


def inverse(permutation: IntArray) -> IntArray:
    found = np.empty_like(permutation)
    found[permutation] = np.arange(len(permutation))
    return found


def improved(problem: Problem, rounds: int) -> Order:
    """At most `rounds` alternations, rows before columns, until neither gains any more. Deterministic."""
    return _improved_together({"": problem}, (), rounds)[""]


def improved_all(
    problems: Mapping[str, Problem],
    rounds: int,
    restarts: int = 0,
    seed: int = 0,
    threads: int | None = None,
    ties: Sequence[Tie] = (),
) -> dict[str, Order]:
    """`improved` for every layer, in threads (the solver runs without the interpreter's lock).

    Args:
        restarts: so many random orders of the columns to start from beside the given one; the best end counts. What
            they draw depends on `seed` and the layer's place only.
        threads: by default a few more than there are cores.
        ties: sides that have one order, from the start on; none is in two, and no layer in one with both sides. The sum
            of their layers' costs counts.
    """
    numbers = {name: number for number, name in enumerate(problems)}

    def solve(part: list[str]) -> dict[str, Order]:
        own = {name: problems[name] for name in part}
        within = [tie for tie in ties if tie[0][0] in own]
        best = _improved_together(own, within, rounds)
        random = np.random.default_rng([seed, numbers[part[0]]])
        for _ in range(restarts if any(len(problem.counts) > 1 for problem in own.values()) else 0):
            other = _improved_together(_shuffled(own, within, random), within, rounds)
            before, after = (sum(own[name].cost(order) for name, order in x.items()) for x in (best, other))
            if after < before - _GAIN * abs(before):
                best = other
        return best

    with ThreadPoolExecutor(threads) as pool:
        found = {name: order for part in pool.map(solve, _parts(problems, ties)) for name, order in part.items()}
    return {name: found[name] for name in problems}


def _improved_together(problems: Mapping[str, Problem], ties: Sequence[Tie], rounds: int) -> dict[str, Order]:
    """Alternations over all sides of some layers, of which tied ones change as one."""
    orders = {name: problem.start for name, problem in problems.items()}
    sides = _sides([name for name, problem in problems.items() if len(problem.counts) > 1], ties)
    for _ in range(rounds):
        gained = False
        for tie in sides:
            costs = reduce(np.add, (problems[name].costs(side, orders[name]) for name, side in tie))
            now: IntArray = getattr(orders[tie[0][0]], tie[0][1])
            before = float(costs[now, np.arange(len(now))].sum())
            new, after = _assigned(costs)
            if after < before - _GAIN * abs(before):
                gained = True
                for name, side in tie:
                    orders[name] = replace(orders[name], **{side: new})
        if not gained:
            break
    return orders


def _sides(names: Sequence[str], ties: Sequence[Tie]) -> list[Tie]:
    """What changes as one: the ties, and every other side by itself, rows before columns."""
    tied = {end for tie in ties for end in tie}
    every: list[tuple[str, Side]] = [(name, side) for name in names for side in ("rows", "columns")]
    return [*ties, *((end,) for end in every if end not in tied)]


def _shuffled(problems: Mapping[str, Problem], ties: Sequence[Tie], random: np.random.Generator) -> dict[str, Problem]:
    """The same problems from a random order of the columns, and of what is tied to columns."""
    problems = dict(problems)
    for tie in _sides(list(problems), ties):
        if any(side == "columns" for _, side in tie):
            new = random.permutation(len(getattr(problems[tie[0][0]].start, tie[0][1])))
            for name, side in tie:
                start = replace(problems[name].start, **{side: new})
                problems[name] = replace(problems[name], start=start)
    return problems


def _parts(names: Iterable[str], ties: Sequence[Tie]) -> list[list[str]]:
    """The layers that are tied to each other, directly or through others, in their order."""
    part_of = {name: [name] for name in names}
    for tie in ties:
        for name, _ in tie[1:]:
            one, other = part_of[tie[0][0]], part_of[name]
            if one is not other:
                one += other
                part_of |= dict.fromkeys(other, one)
    places = {name: place for place, name in enumerate(part_of)}
    parts = [sorted(part, key=places.__getitem__) for part in part_of.values()]
    return [part for name, part in zip(part_of, parts, strict=True) if part[0] == name]
