"""How many channels go: from a rate, or from a target, in whole channels.

A ranking gives every unit the rate from which on it is removed. Ranked inside each group (`rank_locally`), a rate
takes the same share of every layer; ranked across the network (`rank_globally`), it takes the weakest anywhere.
Everything else is the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tersenet.errors import TersenetError
from tersenet.graph.model import Kept, ModelGraph
from tersenet.graph.units import ChannelGroup
from tersenet.recipe_target import Target

Ranking = dict[str, NDArray[np.float64]]
"""Group name -> (size,) rates in (0, 1] from which on each unit is removed."""
USED_UP = 0.999
"""Share of a budget above which no more channels are fitted in."""


def rank_locally(scores: Mapping[str, NDArray[np.float64]]) -> Ranking:
    """The weakest unit of n goes at rate 1/n, the next at 2/n."""
    return {name: (_places(values) + 1) / len(values) for name, values in scores.items()}


def rank_globally(scores: Mapping[str, NDArray[np.float64]]) -> Ranking:
    """The same with the units of all groups in one row; among equals, those of earlier groups go first."""
    if not scores:
        return {}
    every = np.concatenate(list(scores.values()))
    rates = (_places(every) + 1) / len(every)
    cuts = np.cumsum([len(values) for values in scores.values()])[:-1]
    return dict(zip(scores, np.split(rates, cuts), strict=True))


@dataclass(frozen=True)
class Rounding:
    """What is left of a group: at least `at_least` units, a multiple of `multiple`, never more than there are."""

    multiple: int = 1
    at_least: int = 1

    def left(self, size: int, wanted: int) -> int:
        return min(size, math.ceil(max(wanted, self.at_least) / self.multiple) * self.multiple)


def kept_at(ranking: Ranking, rate: float, rounding: Rounding) -> Kept:
    """The units left at a rate. Rounding gives the strongest of the removed ones back."""
    # The small addend keeps 10 * 0.3 whole.
    wanted = {name: int((rates > rate + 1e-9).sum()) for name, rates in ranking.items()}
    return _strongest(ranking, {name: rounding.left(len(ranking[name]), count) for name, count in wanted.items()})


def kept_within(
    graph: ModelGraph, ranking: Ranking, target: Target, original: int, rounding: Rounding, fixed: Kept
) -> Kept:
    """The units left at the smallest rate that meets the target, and more of them until it is used up.

    Without the second part, whole layers lose their last channel at the same rate, and up to that much is wasted.

    Args:
        original: MACs or parameters (as the target says) that a relative target refers to.
        fixed: what is left of the groups that are not ranked.

    Raises:
        TersenetError: a target that can't be met.
    """
    limit = target.limit(original)

    def cost(left: Mapping[str, int]) -> int:
        # All units of a group cost the same, so any of them will do.
        return _count(graph, target)(fixed | {name: np.arange(count) for name, count in left.items()})

    def left_at(rate: float) -> dict[str, int]:
        return {name: len(places) for name, places in kept_at(ranking, rate, rounding).items()}

    rates = [0.0, *np.unique(np.concatenate([np.zeros(0), *ranking.values()])).tolist()]
    rate = smallest_rate(lambda rate: cost(left_at(rate)), rates, limit)
    if rate is None:
        raise _out_of_reach(target, limit, cost(left_at(1.0)), original)
    left = left_at(rate)
    removed = ((when, name) for name, rates in ranking.items() for when in np.sort(rates)[: len(rates) - left[name]])
    used, full = cost(left), set[str]()
    for when, name in sorted(removed, reverse=True):
        if used >= USED_UP * limit:
            break
        wanted = int((ranking[name] >= when).sum())
        if name in full or wanted <= left[name]:
            continue
        more = left | {name: rounding.left(len(ranking[name]), wanted)}
        if (count := cost(more)) <= limit:
            left, used = more, count
        else:
            full.add(name)
    return _strongest(ranking, left)


def rate_steps(sizes: Iterable[int]) -> list[float]:
    """The rates, increasing from 0, at which the number of whole channels left of one of these sizes changes."""
    return sorted({count / size for size in set(sizes) for count in range(size)})


def smallest_rate(cost: Callable[[float], int], rates: Sequence[float], limit: int) -> float | None:
    """The first of the increasing `rates` that costs at most `limit`; None if even the last costs more.

    `cost` must not rise with the rate. It is called about log2(len(rates)) times.
    """
    if not rates or cost(rates[-1]) > limit:
        return None
    low, high = 0, len(rates) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(rates[middle]) <= limit else (middle + 1, high)
    return rates[low]


def uniform_rate(
    graph: ModelGraph, groups: Sequence[ChannelGroup], kept: Callable[[float], Kept], target: Target, original: int
) -> float:
    """The smallest rate for all `groups` with which the network meets the target: for methods that need one number.

    Args:
        kept: what is left of the network at a rate; other groups may have rates of their own.
        original: MACs or parameters (as the target says) that a relative target refers to.

    Raises:
        TersenetError: a target that can't be met.
    """
    limit, count = target.limit(original), _count(graph, target)
    rates = rate_steps(group.size for group in groups) or [0.0]
    rate = smallest_rate(lambda rate: count(kept(rate)), rates, limit)
    if rate is None:
        raise _out_of_reach(target, limit, count(kept(rates[-1])), original)
    return rate


def _count(graph: ModelGraph, target: Target) -> Callable[[Kept], int]:
    return graph.macs if target.kind == "macs" else graph.params


def _out_of_reach(target: Target, limit: int, smallest: int, original: int) -> TersenetError:
    return TersenetError(
        f"target {target.kind} <= {limit:,} can't be met: with the selected layers at their smallest {smallest:,} are "
        f"left of {original:,}. Include more layers, use residual: coupled, or leave multiple and at_least at 1"
    )


def _places(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """The place of each score in increasing order; equal ones in the order they come in."""
    places = np.empty(len(scores), dtype=np.int64)
    places[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    return places


def _strongest(ranking: Ranking, left: Mapping[str, int]) -> Kept:
    """The `left` units of each group that go last."""
    return {name: np.sort(np.argsort(rates)[len(rates) - left[name] :]) for name, rates in ranking.items()}
