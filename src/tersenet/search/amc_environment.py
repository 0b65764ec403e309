"""What the agent of AMC sees of a network, and the wall that keeps its actions within the budget.

Layers are decided one after another; an action says what share of a layer's channels stays.

Source: He et al., AMC, ECCV 2018, arXiv 1802.03494, sections 3.2 and 3.3 (algorithm 1).
Differs: the wall asks for the true cost of every number of channels, layers that are tied included, so that no rounding
is left over. It bounds from below too: no episode leaves more of the budget unused than one step of one layer, so that
all of them are about the same trade. An action of a half is a share that is known to fit into the budget, such as the
one that all layers could keep alike: an agent that knows nothing starts there, and no layer is left with what others
that were decided before it have used up. A state's last part is such an action. What it says of the rest of the network
is in the budget's own unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tersenet.calibration.allocation import Costs
from tersenet.calibration.items import Item
from tersenet.errors import TersenetError
from tersenet.graph.budget import Rounding
from tersenet.graph.model import ModelGraph

STATES = 10
"""Numbers in a state: seven of the layer itself, and what was saved so far, what the layers behind it cost, and the
action before."""


class Wall:
    """How many units each item may keep when those before it are decided.

    Args:
        costs: what the network costs; it must not fall with any number of units.
        limit: the most that it may cost; None: no budget.
        lowest: share of every item that stays at least.
        unit: of the costs, for a message.

    Raises:
        TersenetError: with every item at its lowest the network costs more than `limit`.
    """

    def __init__(self, costs: Costs, limit: int | None, rounding: Rounding, lowest: float, unit: str = "MACs") -> None:
        self.costs, self.limit, self._rounding = costs, limit, rounding
        self.sizes = [item.size for item in costs.items]
        self._levels = [
            sorted({rounding.left(size, count) for count in range(max(1, math.ceil(lowest * size - 1e-9)), size + 1)})
            for size in self.sizes
        ]
        self._floor = [levels[0] for levels in self._levels]
        self._lowest = lowest
        least = costs(np.array(self._floor))
        if limit is not None and least > limit:
            raise TersenetError(
                f"a budget of {limit:,} {unit} can't be met: with {lowest:.0%} of every layer {least:,} are left. "
                "Choose a smaller lowest, include more layers, or leave multiple at 1"
            )

        self.centres = [self._even()] * len(self.sizes)
        """The share of each item that an action of a half stands for."""

    def centre_on(self, counts: Sequence[int]) -> None:
        """From now on an action of a half leaves so many of each item."""
        self.centres = [count / size for count, size in zip(counts, self.sizes, strict=True)]

    def _even(self) -> float:
        """The share that all items can keep alike; without a budget the middle."""
        if self.limit is None:
            return (self._lowest + 1) / 2
        low, high = self._lowest, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            counts = np.array([self._left(size, middle) for size in self.sizes])
            low, high = (middle, high) if self.costs(counts) <= self.limit else (low, middle)
        return low

    def _left(self, size: int, share: float) -> int:
        return self._rounding.left(size, max(round(share * size), math.ceil(self._lowest * size - 1e-9)))

    def share(self, action: float, place: int) -> float:
        """0 is the lowest share of an item, a half its centre, 1 all."""
        return float(np.interp(action, [0.0, 0.5, 1.0], [self._lowest, self.centres[place], 1.0]))

    def action(self, decided: Sequence[int]) -> float:
        """What left the last of these items as it is; a half before the first."""
        if not decided:
            return 0.5
        place = len(decided) - 1
        # Where the centre is an end of the range, all beyond it is the same.
        ends = [min(self._lowest, self.centres[place]) - 1e-9, self.centres[place], 1.0 + 1e-9]
        return float(np.interp(decided[-1] / self.sizes[place], ends, [0.0, 0.5, 1.0]))

    def bounds(self, decided: Sequence[int]) -> tuple[int, int]:
        """The fewest and the most units of the next item.

        With more than the most, the budget would be exceeded even if all items behind it were at their lowest. With
        fewer than the fewest, some of it would be left over even if these stayed whole.
        """
        levels = self._levels[len(decided)]
        if self.limit is None:
            return levels[0], levels[-1]
        return levels[max(0, self._highest(decided, self.sizes))], levels[self._highest(decided, self._floor)]

    def count(self, decided: Sequence[int], share: float) -> int:
        """The units left of the next item where `share` of them is to stay."""
        low, high = self.bounds(decided)
        return min(max(self._left(self.sizes[len(decided)], share), low), high)

    def walk(self, decide: Callable[[list[int]], float]) -> list[int]:
        """The units left of every item: `decide` gives a share for what was decided before."""
        counts: list[int] = []
        for _ in self.sizes:
            counts.append(self.count(counts, decide(counts)))
        return counts

    def _highest(self, decided: Sequence[int], behind: Sequence[int]) -> int:
        """The place of the most units within the budget, with `behind` left of the items after it; -1 for none."""
        here = len(decided)
        row = np.array([*decided, 0, *behind[here + 1 :]])
        low, high = 0, len(self._levels[here])
        while low < high:
            middle = (low + high) // 2
            row[here] = self._levels[here][middle]
            low, high = (middle + 1, high) if self.costs(row) <= (self.limit or 0) else (low, middle)
        return low - 1


class States:
    """The state before each decision: (10,), every number in [0, 1]."""

    def __init__(self, features: NDArray[np.float64], wall: Wall) -> None:
        """`features` (T, 7) of each item, on any scale."""
        self._wall, costs = wall, wall.costs
        low, high = features.min(0), features.max(0)
        self._features = (features - low) / np.where(high > low, high - low, 1.0)
        self._sizes = np.array([item.size for item in costs.items])
        self._whole = max(costs(self._sizes), 1)
        places = np.arange(len(self._sizes))
        self._rest = [1 - costs(np.where(places > here, 0, self._sizes)) / self._whole for here in places]

    def before(self, decided: Sequence[int]) -> Tensor:
        here = len(decided)
        row = np.array([*decided, *self._sizes[here:]])
        saved = 1 - self._wall.costs(row) / self._whole
        return torch.tensor(
            [*self._features[here], saved, self._rest[here], self._wall.action(decided)], dtype=torch.float32
        )


def features(graph: ModelGraph, items: Sequence[Item]) -> NDArray[np.float64]:
    """(T, 7): place, linear or not, channels, outputs, stride, kernel and weights of the layers that read each item."""
    rows: list[list[float]] = []
    for place, item in enumerate(items):
        layers = _read_by(graph, item)
        row = [place, 0, item.size, item.size, 1, 1, 0]
        if layers:
            module, weights = graph.model.get_submodule(layers[0]), [_weight(graph, layer) for layer in layers]
            first, stride = weights[0], getattr(module, "stride", 1)
            row = [
                place, isinstance(module, nn.Linear), item.size, len(first),
                stride if isinstance(stride, int) else max(stride), first.shape[-1] if first.dim() > 2 else 1,
                sum(weight.numel() for weight in weights),
            ]  # fmt: skip
        rows.append([float(number) for number in row])
    return np.array(rows, dtype=np.float64)


def _read_by(graph: ModelGraph, item: Item) -> list[str]:
    """The layers with a weight that read an item; where there is none, those that make it."""
    if item.group is None:
        return [reader.layer for reader in item.readers]
    ends = [graph.ends[member.end] for member in item.group.members]
    reading = [end.layer for end in ends if end.role == "consume" and end.tensors]
    weighted = dict(graph.model.named_parameters())
    return list(dict.fromkeys(layer for layer in reading if f"{layer}.weight" in weighted)) or [
        layer for layer in item.group.producers if f"{layer}.weight" in weighted
    ]


def _weight(graph: ModelGraph, layer: str) -> Tensor:
    return graph.model.get_parameter(f"{layer}.weight")
