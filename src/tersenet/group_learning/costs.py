"""What a layer costs with each number of groups: in weights, multiply-adds, or time on this machine."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

from tersenet.errors import TersenetError
from tersenet.graph.convolutions import convolutions
from tersenet.measuring.layer_latency import Shape, Wanted, measure_table
from tersenet.train.distributed import from_first

if TYPE_CHECKING:
    from tersenet.graph.grouping import Groupable
    from tersenet.graph.model import ModelGraph

Unit = Literal["weights", "MACs", "measured time"]


class Costs:
    """Layer -> its cost at each of its levels, from one group on.

    More groups can take more time. A layer is then cut to the cheapest number of them among those that keep enough of
    its norm, so that what a level costs never rises.
    """

    def __init__(self, unit: Unit, levels: dict[str, list[float]], counts: Mapping[str, Sequence[int]]) -> None:
        self.unit: Unit = unit
        self.levels = levels
        self._counts = counts
        self.whole = sum(costs[0] for costs in levels.values())

    def best(self, name: str, level: int) -> int:
        """The cheapest level up to `level`; of equal ones the coarsest."""
        costs = self.levels[name][:level]
        return 1 + costs.index(min(costs))

    def groups(self, levels: Mapping[str, int]) -> dict[str, int]:
        """Layer -> the number of groups that it is cut to."""
        return {name: self._counts[name][self.best(name, level) - 1] for name, level in levels.items()}

    def saved(self, levels: Mapping[str, int]) -> float:
        """What these levels save, as a share of what all layers cost."""
        return 1 - sum(self.levels[name][self.best(name, level) - 1] for name, level in levels.items()) / self.whole

    def saved_by_groups(self, groups: Mapping[str, int]) -> float:
        """The same from numbers of groups; layers that are not named have one."""
        places = {name: self._counts[name].index(groups.get(name, 1)) for name in self.levels}
        return 1 - sum(self.levels[name][place] for name, place in places.items()) / self.whole


def costs_in(
    unit: Unit,
    graph: ModelGraph,
    layers: Mapping[str, Groupable],
    counts: Mapping[str, Sequence[int]],
    allowed: Mapping[str, int],
    batch: int,
) -> Costs:
    """The cost of every layer at every number of groups that it may have.

    Args:
        counts, allowed: the layers' nested numbers of groups, and how many of them they may have.
        batch: images at a time, where time is measured.

    Raises:
        TersenetError: a layer whose time can't be measured.
    """
    numbers = {name: counts[name][: allowed[name]] for name in layers}
    if unit == "measured time":
        return Costs(unit, _times(graph, numbers, batch), counts)
    whole = {name: layer.macs if unit == "MACs" else layer.params for name, layer in layers.items()}
    return Costs(unit, {name: [whole[name] / n for n in numbers[name]] for name in layers}, counts)


def _times(graph: ModelGraph, numbers: Mapping[str, Sequence[int]], batch: int) -> dict[str, list[float]]:
    """Milliseconds of each layer with so many groups, in all of its passes, with the kernels that `tersenet lower`
    chooses among. Gathers are not in it."""
    found, left = convolutions(graph)
    known = {conv.name: conv for conv in found}
    wanted: dict[str, list[list[Wanted]]] = {}
    for name, counts in numbers.items():
        if name not in known:
            raise TersenetError(f"{name} can't be timed: {left[name]}. Leave it out (exclude)")
        conv = known[name]
        passes = (conv.outputs, *conv.others)
        modules = [_grouped(conv.module, n) for n in counts]
        wanted[name] = [[(m, Shape.of(m, outputs), "direct", None) for outputs in passes] for m in modules]

    def measured() -> dict[str, list[float]]:
        table = measure_table((row for each in wanted.values() for rows in each for row in rows), batch)
        return {name: [sum(table.ms(*row[1:]) for row in rows) for rows in each] for name, each in wanted.items()}

    # All processes of a run decide by the same numbers.
    return from_first(measured)


def _grouped(conv: nn.Conv2d, groups: int) -> nn.Conv2d:
    """A copy of the convolution, on the CPU, with so many groups."""
    made = copy.deepcopy(conv).cpu()
    made.groups = groups
    made.weight = nn.Parameter(made.weight.detach()[:, : conv.in_channels // groups].clone())
    return made
