"""The constants that removed channels emit: measured by running the traced operators, pushed through the next layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.graph import lookup
from tersenet.graph.choices import repeating
from tersenet.graph.example import random_like
from tersenet.graph.labels import End, IntArray, NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.graph.replay import Action, over_kept, replay
from tersenet.graph.trace import tensors_in

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class NotConstant(Exception):
    """Removed channels of these groups reach a layer with values that no bias can replace."""

    def __init__(self, groups: set[str], place: str) -> None:
        super().__init__(place)
        self.groups = groups


@dataclass
class Measured:
    """What the masked network did on noise, twice if need be: values that tell constants from others, and its outputs.

    `low` and `high`: end -> the range (float64, one per removed channel) of what it reads, or of what a scatter point
    emits. `weights`: those that an end reads with, where they are computed in forward. `seed` made the last input, and
    `read` is what was chosen from by values.
    """

    scattered: set[int]
    low: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    high: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    weights: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    outputs: list[list[Tensor]] = field(default_factory=list[list[Tensor]])
    read: list[Tensor] = field(default_factory=list[Tensor])
    seed: int = 0

    def add(self, index: int, values: Tensor) -> None:
        if values.numel() == 0:
            return
        bottom, top = (edge.double().cpu() for edge in values.flatten(1).aminmax(dim=1))
        self.low[index] = torch.minimum(self.low.get(index, bottom), bottom)
        self.high[index] = torch.maximum(self.high.get(index, top), top)


def measure(graph: ModelGraph, gone: NDArrayBool, scattered: set[int]) -> Measured:
    """Run the masked network as the compact one has to compute it: norms over kept channels only."""
    measured = Measured(scattered)
    wanted: dict[int, list[tuple[int, IntArray]]] = {}
    for index, end in enumerate(graph.ends):
        labels = end.labels if index in scattered else end.reads
        if labels is None or (end.role != "consume" and index not in scattered):
            continue
        places = np.flatnonzero(gone[graph.units.of[labels]])
        for op in end.uses if len(places) else []:
            wanted.setdefault(op, []).append((index, places))
    kept_only = over_kept(graph, gone)
    actions = {number: _look(graph, measured, number, ends, kept_only.get(number)) for number, ends in wanted.items()}
    for measured.seed in (1, 2):
        inputs = random_like(graph.example, measured.seed)
        choices = repeating(tensors_in(inputs), graph.trace.choices)
        output = replay(graph.model, graph.trace, inputs, {**kept_only, **actions}, choices)
        measured.outputs.append(tensors_in(output))
        measured.read = getattr(choices, "read", [])
        if not any(bool(edge.any()) for edge in [*measured.low.values(), *measured.high.values()]):
            break  # zero on other inputs too, or the proof will tell
    return measured


def _look(
    graph: ModelGraph, measured: Measured, number: int, ends: list[tuple[int, IntArray]], run: Action | None
) -> Action:
    """Run an operator, and note what goes into it or comes out at the removed channels of some ends."""

    def look(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for index, places in ends:
            if index not in measured.scattered:
                end = graph.ends[index]
                if end.computed:
                    measured.weights[index] = _weight_of(end, args)
                measured.add(index, _channels(args[end.reads_argument], end.reads_axis, places))
        result = run(func, args, kwargs) if run is not None else func(*args, **kwargs)
        for index, places in ends:
            if index in measured.scattered:
                first = result if isinstance(result, Tensor) else result[0]
                measured.add(index, _channels(first, -1 if "mm" in graph.trace.ops[number].name else 1, places))
        return result

    return look


def constants_of(graph: ModelGraph, gone: NDArrayBool, measured: Measured) -> dict[int, Tensor]:
    """End -> the constants (float64, one per removed channel) that it reads, or that a scatter point emits.

    Raises:
        NotConstant: values that change.
    """
    of = graph.units.of
    owners: set[str] = set()
    where: list[str] = []
    for index, bottom in measured.low.items():
        end, high = graph.ends[index], measured.high[index]
        labels = end.labels if index in measured.scattered else end.reads
        # Without a layer there is no bias that could stand for them, and two layers would need two: they must be zero.
        one_layer = bool(end.tensors) and len({module for module, _ in end.attributes}) < 2
        wrong = high - bottom if one_layer else torch.maximum(high.abs(), bottom.abs())
        if bool((wrong > 1e-5 * high.abs().max().clamp_min(1e-12)).any()) and labels is not None:
            owners |= _owners(graph, labels, np.flatnonzero(gone[of[labels]])[(wrong > 0).numpy()])
            where.append(end.layer)
    if owners:
        raise NotConstant(owners, ", ".join(dict.fromkeys(where)))
    return {index: (low + measured.high[index]) / 2 for index, low in measured.low.items()}


def _weight_of(end: End, args: tuple[Any, ...]) -> Tensor:
    """(C_out, C_in, ...) as the operator gets it."""
    weight = args[end.reads_argument + 1].detach()
    return weight if end.reads_axis == 1 else weight.t()


def _channels(value: Tensor, axis: int, places: IntArray) -> Tensor:
    chosen = value.detach().index_select(axis, torch.from_numpy(places).to(value.device))
    return chosen.movedim(axis, 0)


def push_through(
    graph: ModelGraph, end: End, gone: NDArrayBool, values: Tensor, computed: Tensor | None = None
) -> tuple[Tensor, bool]:
    """What a layer makes of constants on its removed inputs, and whether that is the same everywhere (no padding).

    Args: computed: the layer's weights where they are not its parameter.

    Returns (C_out, kH, kW), one value per kernel tap; (C_out,) for a linear layer.

    Raises:
        NotConstant: a layer or a padding mode for which there is no such value.
    """
    layer = lookup.submodule(graph.model, end.layer)
    removed = gone[graph.units.of[end.reads]]
    weight = (graph.tensor(end.tensors[0]) if computed is None else computed).detach().double().cpu()
    full = torch.zeros(len(removed), dtype=torch.float64)
    full[torch.from_numpy(np.flatnonzero(removed))] = values
    convolution = isinstance(layer, _CONVOLUTIONS)
    if not convolution and not isinstance(layer, nn.Linear):
        raise NotConstant(_owners(graph, end.reads, removed), f"{end.layer} ({type(layer).__name__})")
    groups = layer.groups if convolution else 1
    # Every output channel sees the constants of its own group's inputs: (groups, C_out / groups, C_in / groups, taps).
    parts = weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    taps = torch.einsum("goit,gi->got", parts, full.view(groups, -1)).reshape(-1, *weight.shape[2:])
    padded = convolution and layer.padding not in ("valid", (0,) * len(layer.kernel_size))
    if convolution and padded and layer.padding_mode != "zeros":
        # Padding that repeats the image repeats the constant too, which the adapter's map does not.
        raise NotConstant(_owners(graph, end.reads, removed), f"{end.layer} (padding_mode={layer.padding_mode!r})")
    return taps, not padded


def _owners(graph: ModelGraph, labels: IntArray | None, places: Any) -> set[str]:
    units = set(graph.units.of[labels[places]].tolist()) if labels is not None else set[int]()
    return {g.name for g in graph.groups if not units.isdisjoint(g.units.tolist())}
