"""How strongly to push towards a goal while training, and which threshold meets it in the end. Pure arithmetic.

`saved` is what grouping saves, as a share (0..1) of what the groupable layers cost, in weights or in multiply-adds.

Source: Zhang et al., arXiv 2002.08127, and its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


def next_strength(
    strength: float,
    step: float,
    saved: float,
    before: float,
    goal: float,
    epochs_left: int,
    total: int,
    gain: float | None = None,
) -> float:
    """The regulariser's coefficient for the next epoch, never below 0.

    As published (`gain` None): one `step` more where less was saved in this epoch than is needed per epoch to reach the
    goal, one less at or above the goal. With a `gain`: `gain` steps for every goal / `total` by which the epoch fell
    short of that pace, and as many less where it was ahead, but never less than half of what it was: without any push,
    weights grow back within an epoch.

    Args:
        saved, before: the share saved after this epoch, and after the one before.
        epochs_left: the epochs that the missing rest is spread over, at least 1.
    """
    need = (goal - saved) / epochs_left
    gained = saved - before
    if gain is not None:
        change = gain * (need - gained) * total / goal if goal > 0 else -1.0
        return max(strength / 2, strength + step * change)
    change = -1.0 if saved >= goal else 1.0 if gained < need else 0.0
    return max(0.0, strength + step * change)


def global_threshold(
    saved: Callable[[float], float], goal: float, tolerance: float = 0.01, halvings: int = 10
) -> float:
    """One threshold for all layers, by bisection in [0, 1]: the first that saves between goal and goal + tolerance, or
    else the lowest seen that saves at least the goal.

    `saved` must not fall with the threshold, and must reach the goal at 1. It is called once, and at most once more
    after each of `halvings` halvings: with ten of them, the thresholds are multiples of 1 / 2048, as published.
    """
    low, high = 0.0, 1.0
    for _ in range(halvings + 1):
        middle = (low + high) / 2
        share = saved(middle)
        if goal <= share <= goal + tolerance:
            return middle
        low, high = (low, middle) if share >= goal else (middle, high)
    return high


def trimmed_levels(
    levels: Mapping[str, int],
    kept: Mapping[str, Sequence[float]],
    costs: Mapping[str, Sequence[float]],
    spare: float,
) -> dict[str, int]:
    """Levels given back, one at a time, while what that costs fits into `spare`: first the one that brings back the
    largest share of its layer's norm for its cost.

    Args:
        kept: layer -> share of its norm that each level keeps, from level 1 on.
        costs: layer -> what it costs at each level, in the unit of `spare`.
    """
    levels = dict(levels)
    while True:
        best: tuple[float, str, float] | None = None
        for name, level in levels.items():
            extra = costs[name][level - 2] - costs[name][level - 1] if level > 1 else 0.0
            if level > 1 and extra <= spare:
                worth = (kept[name][level - 2] - kept[name][level - 1]) / max(extra, 1e-30)
                if best is None or worth > best[0]:
                    best = (worth, name, extra)
        if best is None:
            return levels
        levels[best[1]] -= 1
        spare -= best[2]
