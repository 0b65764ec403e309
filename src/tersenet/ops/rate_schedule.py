"""How much is pruned when: the pruning rate as a function of training progress. Pure arithmetic, no torch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

Schedule = Literal["constant", "asymptotic", "linear", "cubic", "cosine"]


def rate_at(schedule: Schedule, goal: float, initial: float, knee: float, done: float, total: float) -> float:
    """The pruning rate after `done` of `total` epochs. At the end it is exactly `goal`.

    constant: `goal` throughout (SFP). asymptotic: a * exp(-k i) + b through (0, initial), (knee * total, 3/4 goal) and
    (total, goal) (ASFP, knee 1/8). linear and cosine rise as their names say; cubic is Zhu and Gupta's
    goal + (initial - goal) * (1 - i / total)^3.

    Raises:
        ValueError: an asymptotic curve through these points does not exist.

    Source: He et al., Asymptotic Soft Filter Pruning, arXiv 1808.07471; Zhu and Gupta, arXiv 1710.01878.
    """
    progress = done / total
    if schedule == "constant" or progress >= 1:
        return goal
    if schedule == "linear":
        risen = progress
    elif schedule == "cubic":
        risen = 1 - (1 - progress) ** 3
    elif schedule == "cosine":
        risen = (1 - math.cos(math.pi * progress)) / 2
    else:
        t = math.exp(-asymptotic_decay(goal, initial, knee))
        risen = (1 - t**progress) / (1 - t)
    return initial + (goal - initial) * risen


@lru_cache(maxsize=64)
def asymptotic_decay(goal: float, initial: float, knee: float) -> float:
    """k * total of the asymptotic curve: the solution of (1 - t^knee) / (1 - t) = s with t = exp(-k total).

    s = (3/4 goal - initial) / (goal - initial) is the part of the rise done at the knee; the left side falls from 1 at
    t = 0 to `knee` at t = 1, so there is a solution for knee < s < 1 only.

    Raises:
        ValueError: for any other s.
    """
    if goal == initial:
        return 1.0
    part = (0.75 * goal - initial) / (goal - initial)
    if not 0 < knee < part < 1:
        raise ValueError(
            f"no asymptotic curve rises from initial_rate (={initial}) to 3/4 of the rate (={goal}) at knee (={knee}) "
            f"of the run: the knee must lie between 0 and {part:.4g}"
        )
    low, high = 1e-9, 1e4
    for _ in range(200):
        k = (low + high) / 2
        # More decay means an earlier rise.
        if math.expm1(-k * knee) / math.expm1(-k) < part:
            low = k
        else:
            high = k
    return (low + high) / 2


def pruned_count(size: int, rate: float, multiple: int = 1) -> int:
    """floor(size * rate), or fewer so that at least one and a multiple of `multiple` are left (never more than `size`).

    The small addend keeps 10 * 0.1 from becoming 0: `int(10 * (1 - 0.9))` is 0 in floating point. It also makes all of
    a rate just below 1, which would leave nothing.
    """
    left = max(1, size - math.floor(size * rate + 1e-9))
    return max(0, size - -(-left // multiple) * multiple)
