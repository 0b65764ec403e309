"""What can be chosen: channels of a group, which go wherever they occur, or inputs that a single layer reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tersenet.calibration.readers import Reader, find_readers, units_read
from tersenet.errors import GraphError, UnknownNameError
from tersenet.graph.labels import IntArray
from tersenet.graph.model import ModelGraph
from tersenet.graph.select import matches, select_groups
from tersenet.graph.units import ChannelGroup
from tersenet.nn.adapter import ChannelAdapter

Counts = dict[str, int]
"""Item -> how many of its units are left."""
INPUT = "input:"


@dataclass(frozen=True)
class Item:
    """`units` of which some are kept. `readers` are the layers fitted to them. Without a `group` only the one reader
    loses them: it reads a sample of a shared tensor, which stays whole."""

    name: str
    units: IntArray
    readers: tuple[Reader, ...]
    group: ChannelGroup | None = None

    @property
    def size(self) -> int:
        return len(self.units)


@dataclass(frozen=True)
class Items:
    """Everything to choose from in the order of the network, all readers, and consuming ends without one."""

    all: tuple[Item, ...]
    readers: tuple[Reader, ...]
    others: dict[int, str]

    @property
    def sizes(self) -> Counts:
        return {item.name: item.size for item in self.all}


def find_items(graph: ModelGraph, include: Sequence[str], exclude: Sequence[str], sample: bool) -> Items:
    """The groups that may be pruned and, with `sample`, the inputs of layers that read a residual trunk in their place.

    Raises:
        UnknownNameError: a pattern that matches nothing.
        GraphError: nothing is left to choose from.
    """
    readers, others = find_readers(graph)
    trunks = _trunks(graph) if sample else set[str]()
    inputs = [_input_of(graph, reader, trunks) for reader in readers] if sample else []
    sampled = [item for item in inputs if item is not None]
    names = {item.name for item in sampled}
    own = [p for p in (*include, *exclude) if p.startswith(INPUT)]
    for pattern in own:
        if not any(matches(name, [pattern]) for name in names):
            raise UnknownNameError("layer", pattern, sorted(names))
    groups = _groups(graph, include, exclude)
    items = [
        Item(
            group.name,
            group.units,
            tuple(r for r in readers if np.isin(units_read(graph, r), group.units).any()),
            group,
        )
        for group in groups
        if group.name not in trunks
    ]
    for item in sampled:
        both = (item.name, item.readers[0].layer)
        if any(matches(n, include) for n in both) and not any(matches(n, exclude) for n in both):
            items.append(item)
    if not items:
        raise GraphError("no layer is left to prune (include, exclude, or tied by a residual sum)")
    first = {r.end: place for place, r in enumerate(readers)}
    items.sort(key=lambda item: first[item.readers[0].end] if item.readers else len(first))
    return Items(tuple(items), tuple(readers), others)


def _groups(graph: ModelGraph, include: Sequence[str], exclude: Sequence[str]) -> list[ChannelGroup]:
    plain = [p for p in include if not p.startswith(INPUT)]
    return select_groups(graph, plain, [p for p in exclude if not p.startswith(INPUT)]) if plain else []


def _trunks(graph: ModelGraph) -> set[str]:
    """Groups whose channels several layers add up."""
    alone = graph.with_residual("independent")
    ends = {index for _, origin, _ in alone.found.scatters for index in origin}
    layers = {alone.ends[index].layer for index in ends}
    return {
        g.name for g in graph.groups if any(graph.ends[m.end].layer in layers for m in g.members if _made(graph, m.end))
    }


def _made(graph: ModelGraph, end: int) -> bool:
    return graph.ends[end].role in ("produce", "pass")


def _input_of(graph: ModelGraph, reader: Reader, trunks: set[str]) -> Item | None:
    """What a convolution reads, if it is a trunk's channels and nothing else."""
    module = graph.model.get_submodule(reader.layer)
    holder = graph.model.get_submodule(reader.layer.rpartition(".")[0])
    if isinstance(module, nn.Linear) or reader.groups > 1 or isinstance(holder, ChannelAdapter) or len(reader.uses) > 1:
        return None
    units = units_read(graph, reader)[0]
    shared = np.concatenate([np.zeros(0, np.int64), *(g.units for g in graph.groups if g.name in trunks)])
    if not np.isin(units, shared).all() or len(np.unique(units)) < len(units):
        return None
    return Item(INPUT + reader.layer, units, (reader,))


class Costs:
    """MACs or parameters for numbers of units left: a sum of products of the shares that are left on tensors' axes."""

    way_out = "Include more layers, use residual: coupled, or leave multiple and at_least at 1"

    def __init__(self, graph: ModelGraph, items: Sequence[Item], kind: str) -> None:
        self.items = items
        self.sizes = np.array([item.size for item in items], dtype=np.float64)
        of, self._owner = graph.units.of, np.full(int(graph.units.of.max()) + 1, -1)
        for place, item in enumerate(items):
            if item.group is not None:
                self._owner[item.units] = place
        terms = _mac_terms(graph) if kind == "macs" else _param_terms(graph)
        width = 1 + max((len(axes) for _, _, axes in terms), default=0)
        self.amounts = np.array([amount for _, amount, _ in terms], dtype=np.float64)
        self.fixed = np.ones((len(terms), width))
        self.shares = np.zeros((len(terms), width, len(items)))
        for row, (name, _, axes) in enumerate(terms):
            for column, labels in enumerate(axes):
                self._axis(row, column, of[labels])
            for place, item in enumerate(items):
                if item.group is None and name in (item.readers[0].layer, f"{item.readers[0].layer}.weight"):
                    self.fixed[row, -1], self.shares[row, -1, place] = 0.0, 1.0

    def _axis(self, row: int, column: int, units: IntArray) -> None:
        counts = np.bincount(self._owner[units] + 1, minlength=len(self.items) + 1) / len(units)
        self.fixed[row, column], self.shares[row, column] = counts[0], counts[1:]

    def __call__(self, left: NDArray[np.int64]) -> int:
        return round(float((self.amounts * (self.fixed + self.shares @ (left / self.sizes)).prod(1)).sum()))


Terms = list[tuple[str, float, list[IntArray]]]


def _mac_terms(graph: ModelGraph) -> Terms:
    return [(layer.name, layer.macs // graph.batch, list(layer.scales)) for layer in graph.found.layers]


def _param_terms(graph: ModelGraph) -> Terms:
    from tersenet.graph.shrink import axis_in

    axes: dict[str, dict[int, IntArray]] = {}
    tensors = dict(graph.model.named_parameters())
    for end in graph.ends:
        for name in end.tensors:
            if name in tensors:
                axes.setdefault(name, {})[axis_in(end, tensors[name].dim())] = end.labels
    return [(name, float(p.numel()), list(axes.get(name, {}).values())) for name, p in tensors.items()]


def named_rates(items: Items, rates: Mapping[str, float]) -> dict[str, float]:
    """Item -> the rate of the first pattern that matches it: its name, or one of the layers that make it.

    Raises:
        UnknownNameError: a pattern that matches nothing.
    """
    layers = {item.name: (item.name, *(item.group.producers if item.group else ())) for item in items.all}
    for pattern in rates:
        if not any(matches(name, [pattern]) for names in layers.values() for name in names):
            raise UnknownNameError("layer", pattern, sorted({n for names in layers.values() for n in names}))
    found: dict[str, float] = {}
    for item, names in layers.items():
        rate = next((r for pattern, r in rates.items() if any(matches(n, [pattern]) for n in names)), None)
        if rate is not None:
            found[item] = rate
    return found
