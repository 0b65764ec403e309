"""Kernels timed where they run: inside the network, behind and before its other operators.

Alone a kernel finds its weight in the cache, and memory that its last run gave back. In the network it finds what the
layers before it left there, so that the fastest kernel alone may not be the fastest one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from tersenet.lowering.timings import Times, clock, for_seconds
from tersenet.measuring.turns import timed

_SECONDS_OF_LAYERS = 4.0
_SECONDS_OF_PASSES = 1.5


class _Stand(nn.Module):
    """In a layer's place while it is timed: runs the kernel whose turn it is, or else the first."""

    def __init__(self, kernels: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.turn = ""
        self.times: dict[str, list[float]] = {name: [] for name in kernels}
        self._kernels, self._first, self._clock = kernels, next(iter(kernels)), clock()

    def forward(self, *args: Tensor) -> Tensor:
        name = self.turn if self.turn in self._kernels else self._first
        start = self._clock()
        y = self._kernels[name](*args)
        self.times[name].append((self._clock() - start) / 1e6)
        return y

    def forget(self) -> None:
        for taken in self.times.values():
            taken.clear()


def layers_timed(
    graph: fx.GraphModule, kernels: Mapping[str, Mapping[str, nn.Module]], run: Callable[[], Any]
) -> Times:
    """Median milliseconds of each layer's kernels.

    Args:
        kernels: the name of a layer's module in `graph` -> choice -> what may take its place.
        run: makes a pass of `graph`. In each pass all layers that have a certain choice run it.
    """
    stands = {target: _Stand(found) for target, found in kernels.items()}
    before = {target: graph.get_submodule(target) for target in stands}

    def turn(name: str) -> float:
        for stand in stands.values():
            stand.turn = name
        return timed(run)

    def forget() -> None:
        for stand in stands.values():
            stand.forget()

    try:
        for target, stand in stands.items():
            graph.add_module(target, stand)
        choices = dict.fromkeys(name for found in kernels.values() for name in found)
        for_seconds({name: partial(turn, name) for name in choices}, _SECONDS_OF_LAYERS, forget)
    finally:
        for target, module in before.items():
            graph.add_module(target, module)
    return {
        target: {name: statistics.median(taken) for name, taken in stand.times.items()}
        for target, stand in stands.items()
    }


def passes_timed(contenders: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each, in turns."""
    timers = {name: partial(timed, run, clock()) for name, run in contenders.items()}
    return {name: statistics.median(taken) for name, taken in for_seconds(timers, _SECONDS_OF_PASSES).items()}
