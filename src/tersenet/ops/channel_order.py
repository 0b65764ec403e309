"""The order of a convolution's channels that brings its large kernels together in blocks, by exact assignment.

Minimises <S[rows][:, columns], R> over both permutations. Alternating between the two, each is a linear assignment
problem, which is solved exactly; the cost never rises. Both at once would be NP-hard.

Source: Zhang et al., arXiv 2002.08127, section 3.2 (an optimal transport with unit marginals, whose vertices are
    permutations). Differs: an assignment solver in place of a network simplex; a step that gains nothing is not taken,
    so that the order stands still once it is found; rows are carried over too; sides of several layers can be tied to
    one order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tersenet.ops.assignment import IntArray, assigned, cost_of, inverse
from tersenet.ops.group_levels import Matrix, block_costs, block_sums, cost_matrix

Side = Literal["rows", "columns"]
_OTHER: dict[Side, Side] = {"rows": "columns", "columns": "rows"}
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
        return assigned(self.costs(self.S, columns))

    def best_columns(self, rows: IntArray) -> tuple[IntArray, float]:
        """The columns' best order for fixed rows, and its cost."""
        return assigned(self.costs(self.S.T, rows))

    def costs(self, norms: Matrix, order: IntArray) -> Matrix:
        """(channels, blocks): what every row of `norms` costs in each of the finest blocks, with the other side's
        channels in this order. `norms` is S for its rows, and S.T for its columns."""
        return block_costs(block_sums(norms, order, self.counts[-1]), self.counts, self.decay)


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
    # The columns' norms turned round once: what is read along a row lies together.
    norms = {
        (name, side): problems[name].S if side == "rows" else np.ascontiguousarray(problems[name].S.T)
        for tie in sides
        for name, side in tie
    }
    # A side that has just changed is at its best: when all others are too, that is the end.
    settled = -1
    for tie in islice(cycle(sides), rounds * len(sides)):
        costs = _summed(
            problems[name].costs(norms[name, side], getattr(orders[name], _OTHER[side])) for name, side in tie
        )
        before = cost_of(costs, getattr(orders[tie[0][0]], tie[0][1]))
        new, after = assigned(costs)
        settled += 1
        if after < before - _GAIN * abs(before):
            settled = 0
            for name, side in tie:
                orders[name] = replace(orders[name], **{side: new})
        if settled == len(sides) - 1:
            break
    return orders


def _summed(costs: Iterable[Matrix]) -> Matrix:
    """(channels, blocks): the sum of several layers' costs, whose blocks may differ in width."""
    first, *others = costs
    if not others:
        return first
    blocks = math.lcm(first.shape[1], *(other.shape[1] for other in others))
    each = (np.repeat(table, blocks // table.shape[1], axis=1) for table in (first, *others))
    return np.sum(list(each), axis=0)


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
