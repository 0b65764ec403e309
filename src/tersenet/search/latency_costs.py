"""What a network's convolutions cost in time for numbers of channels left: a budget for a search.

Every layer is timed at a grid of sizes, with the fastest kernel that `tersenet lower` could choose; between, times are
interpolated. They are made to rise with the channels, since a wall needs that. What other layers take is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tersenet.calibration.items import Item
from tersenet.graph.convolutions import Convolution, convolutions
from tersenet.graph.labels import IntArray
from tersenet.graph.model import ModelGraph
from tersenet.measuring.layer_latency import Shape, Wanted, measure_table

STEPS = 4
"""Sizes that each axis is timed at: a quarter of the channels, a half, three quarters, all."""
_Row = tuple[float, NDArray[np.float64]]
"""The share of an axis that no item can remove, and of each item."""


class LatencyCosts:
    """Microseconds for one image, on torch's current number of threads. The same question has the same answer: times
    are kept in the cache folder."""

    way_out = "Include more layers, use residual: coupled, or leave multiple and at_least at 1"

    def __init__(self, graph: ModelGraph, items: Sequence[Item]) -> None:
        self.items = items
        self._sizes = np.array([item.size for item in items], dtype=np.float64)
        self._owner = np.full(int(graph.units.of.max()) + 1, -1)
        for place, item in enumerate(items):
            if item.group is not None:
                self._owner[item.units] = place
        found, _ = convolutions(graph)
        self._times = np.zeros((len(found), STEPS + 1, STEPS + 1))
        axes = [self._axes(graph, conv.name) for conv in found]
        self._fixed = np.array([[fixed for fixed, _ in pair] for pair in axes]).reshape(len(found), 2)
        self._shares = np.array([[share for _, share in pair] for pair in axes]).reshape(len(found), 2, len(items))
        for place, conv in enumerate(found):
            self._times[place] = _times(conv)

    def __call__(self, left: NDArray[np.int64]) -> int:
        shares = self._fixed + self._shares @ (left / self._sizes)
        weights = np.clip(1 - np.abs(shares[..., None] * STEPS - np.arange(STEPS + 1)), 0, 1)
        return round(1000 * float(np.einsum("li,lij,lj->", weights[:, 0], self._times, weights[:, 1])))

    def _axes(self, graph: ModelGraph, layer: str) -> tuple[_Row, _Row]:
        """Of what a convolution makes, and of what it reads; a depthwise one only makes."""
        whole = (1.0, np.zeros(len(self.items)))
        made, read = whole, whole
        for end in graph.ends:
            if end.layer != layer or not end.tensors or end.tensors[0] != f"{layer}.weight":
                continue
            row = self._row(graph.units.of[end.labels])
            made, read = (made, row) if end.role == "consume" else (row, read)
        for place, item in enumerate(self.items):
            if item.group is None and item.readers[0].layer == layer:
                read = (0.0, np.eye(len(self.items))[place])
        return made, read

    def _row(self, units: IntArray) -> _Row:
        counts = np.bincount(self._owner[units] + 1, minlength=len(self.items) + 1) / len(units)
        return float(counts[0]), counts[1:]


def _times(conv: Convolution) -> NDArray[np.float64]:
    """(STEPS + 1, STEPS + 1) milliseconds for 0, 1, ... quarters of the outputs, and of the inputs."""
    times = np.zeros((STEPS + 1, STEPS + 1))
    depthwise = conv.module.groups == conv.module.in_channels > 1
    for made in range(1, STEPS + 1):
        for read in [STEPS] if depthwise else range(1, STEPS + 1):
            smaller = _smaller(conv.module, made / STEPS, read / STEPS, depthwise)
            wanted: list[Wanted] = [
                (smaller, Shape.of(smaller, outputs), "direct", None) for outputs in (conv.outputs, *conv.others)
            ]
            table = measure_table(wanted)
            times[made, read] = sum(table.ms(*row[1:]) for row in wanted)
    return np.maximum.accumulate(np.maximum.accumulate(times, 0), 1)


def _smaller(conv: nn.Conv2d, made: float, read: float, depthwise: bool) -> nn.Conv2d:
    """A convolution with these shares of the outputs and inputs; of a grouped one, of every group's."""
    groups = max(1, round(conv.groups * made)) if depthwise else conv.groups
    inputs = groups if depthwise else groups * max(1, round(conv.in_channels / groups * read))
    outputs = groups * max(1, round(conv.out_channels / conv.groups * (1 if depthwise else made)))
    return nn.Conv2d(
        inputs, outputs, (conv.kernel_size[0], conv.kernel_size[1]), (conv.stride[0], conv.stride[1]),
        conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1]),
        (conv.dilation[0], conv.dilation[1]), groups, conv.bias is not None, conv.padding_mode,
    )  # fmt: skip
