"""One item of each row, so that costs stay within a budget and losses are smallest."""

from __future__ import annotations

from collections.abc import Sequence

_MOST = 4000
"""Partial choices that are kept; of more, the best in each of so many equal steps of cost."""

Item = tuple[float, float, int]
"""Cost, loss, and what the item is called."""


def best_under(rows: Sequence[Sequence[Item]], budget: float) -> list[int]:
    """The item of each row: exact up to thousands of undominated partial choices, and within the budget always.

    Raises: ValueError if the cheapest items of all rows cost more than the budget.
    """
    # What the rows behind this one cost at least; a hair of room for sums in another order.
    rest = [sum(min(item[0] for item in row) for row in rows[place + 1 :]) for place in range(len(rows))]
    room = budget * (1 + 1e-9)
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for row, after in zip(rows, rest, strict=True):
        grown = [
            (cost + item[0], loss + item[1], (*names, item[2]))
            for cost, loss, names in front
            for item in row
            if cost + item[0] + after <= room
        ]
        front = _thinned(_undominated(grown), room)
    if not front:
        raise ValueError(f"nothing costs {budget} or less")
    return list(min(front, key=lambda one: (one[1], one[0]))[2])


def _undominated(
    choices: list[tuple[float, float, tuple[int, ...]]],
) -> list[tuple[float, float, tuple[int, ...]]]:
    """Those than which none is both cheaper and better, by rising cost."""
    found: list[tuple[float, float, tuple[int, ...]]] = []
    for choice in sorted(choices, key=lambda one: one[:2]):
        if not found or choice[1] < found[-1][1]:
            found.append(choice)
    return found


def _thinned(
    front: list[tuple[float, float, tuple[int, ...]]], room: float
) -> list[tuple[float, float, tuple[int, ...]]]:
    """The cheapest, and the best of each step: losses fall along the front."""
    if len(front) <= _MOST:
        return front
    steps = {int(choice[0] / room * _MOST): choice for choice in front}
    return [front[0], *(choice for choice in steps.values() if choice is not front[0])]
