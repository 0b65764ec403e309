"""One rate for all layers that meets a target: a search over whole channels, for any method that has rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tersenet.errors import TersenetError
from tersenet.graph.model import Kept, ModelGraph
from tersenet.graph.units import ChannelGroup
from tersenet.recipe_target import Target


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
    """The smallest rate for all `groups` with which the network meets the target.

    Args:
        kept: what is left of the network at a rate; other groups may have rates of their own.
        original: MACs or parameters (as the target says) that a relative target refers to.

    Raises:
        TersenetError: a target that can't be met.
    """
    limit = target.limit(original)

    def cost(rate: float) -> int:
        return graph.macs(kept(rate)) if target.kind == "macs" else graph.params(kept(rate))

    rates = rate_steps(group.size for group in groups) or [0.0]
    rate = smallest_rate(cost, rates, limit)
    if rate is None:
        raise TersenetError(
            f"target {target.kind} <= {limit:,} can't be met: with the selected layers at their smallest "
            f"{cost(rates[-1]):,} are left of {original:,}. Include more layers, use residual: coupled, "
            "or leave multiple at 1"
        )
    return rate
