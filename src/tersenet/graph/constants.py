"""The constants that removed channels emit: measured by running the traced operators, pushed through the next layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.graph.labels import End, IntArray, NDArrayBool
from tersenet.graph.model import ModelGraph, random_like
from tersenet.graph.replay import Action, over_kept, replay

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class NotConstant(Exception):
    """Removed channels of these groups reach a layer with values that no bias can replace."""

    def __init__(self, groups: set[str], place: str) -> None:
        super().__init__(place)
        self.groups = groups


def measure_constants(
    graph: ModelGraph, gone: NDArrayBool, scattered: set[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """End -> the constants (float64, one per removed channel) that it reads, or that a scatter point emits; and
    end -> the weights that it reads them with, where these are computed in forward."""
    weights: dict[int, Tensor] = {}
    of = graph.units.of
    wanted: dict[int, list[tuple[int, IntArray]]] = {}
    for index, end in enumerate(graph.ends):
        labels = end.labels if index in scattered else end.reads
        if labels is None or (end.role != "consume" and index not in scattered):
            continue
        places = np.flatnonzero(gone[of[labels]])
        for op in end.uses if len(places) else []:
            wanted.setdefault(op, []).append((index, places))
    low: dict[int, Tensor] = {}
    high: dict[int, Tensor] = {}
    for seed in (1, 2) if wanted else ():
        for index, values in _look(graph, gone, wanted, scattered, seed, weights):
            bottom, top = values.amin(1), values.amax(1)
            low[index] = torch.minimum(low.get(index, bottom), bottom)
            high[index] = torch.maximum(high.get(index, top), top)
    owners: set[str] = set()
    where: list[str] = []
    for index, bottom in low.items():
        end = graph.ends[index]
        labels = end.labels if index in scattered else end.reads
        spread = high[index] - bottom
        # Without a layer there is no bias that could stand for them, and two layers would need two: they must be zero.
        one_layer = bool(end.tensors) and len({module for module, _ in end.attributes}) < 2
        wrong = spread if one_layer else torch.maximum(high[index].abs(), bottom.abs())
        if bool((wrong > 1e-5 * high[index].abs().max().clamp_min(1e-12)).any()) and labels is not None:
            owners |= _owners(graph, labels, np.flatnonzero(gone[of[labels]])[(wrong > 0).numpy()])
            where.append(end.layer)
    if owners:
        raise NotConstant(owners, ", ".join(dict.fromkeys(where)))
    return {index: (low[index] + high[index]) / 2 for index in low}, weights


def _look(
    graph: ModelGraph,
    gone: NDArrayBool,
    wanted: dict[int, list[tuple[int, IntArray]]],
    scattered: set[int],
    seed: int,
    weights: dict[int, Tensor],
) -> list[tuple[int, Tensor]]:
    """(end, values (channels, everything else)) of every wanted end, on noise."""
    seen: list[tuple[int, Tensor]] = []
    kept_only = over_kept(graph, gone)

    def action(number: int) -> Action:
        def look(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for index, places in wanted[number]:
                if index not in scattered:
                    end = graph.ends[index]
                    if end.computed:
                        weights[index] = _weight_of(end, args)
                    seen.append((index, _channels(args[end.reads_argument], end.reads_axis, places)))
            run = kept_only.get(number)
            result = run(func, args, kwargs) if run is not None else func(*args, **kwargs)
            for index, places in wanted[number]:
                if index in scattered:
                    first = result if isinstance(result, Tensor) else result[0]
                    axis = -1 if "mm" in graph.trace.ops[number].name else 1
                    seen.append((index, _channels(first, axis, places)))
            return result

        return look

    replay(graph.model, graph.trace, random_like(graph.example, seed), {**kept_only, **{n: action(n) for n in wanted}})
    return seen


def _weight_of(end: End, args: tuple[Any, ...]) -> Tensor:
    """(C_out, C_in, ...) as the operator gets it."""
    weight = args[end.reads_argument + 1].detach()
    return weight if end.reads_axis == 1 else weight.t()


def _channels(value: Tensor, axis: int, places: IntArray) -> Tensor:
    chosen = value.detach().index_select(axis, torch.from_numpy(places).to(value.device))
    return chosen.movedim(axis, 0).flatten(1).double().cpu()


def push_through(
    graph: ModelGraph, end: End, gone: NDArrayBool, values: Tensor, computed: Tensor | None = None
) -> tuple[Tensor, bool]:
    """What a layer makes of constants on its removed inputs, and whether that is the same everywhere (no padding).

    Args: computed: the layer's weights where they are not its parameter.

    Returns (C_out, kH, kW), one value per kernel tap; (C_out,) for a linear layer.

    Raises:
        NotConstant: a layer or a padding mode for which there is no such value.
    """
    layer = graph.model.get_submodule(end.layer)
    removed = gone[graph.units.of[end.reads]]
    weight = (graph.tensor(end.tensors[0]) if computed is None else computed).detach().double().cpu()
    full = torch.zeros(len(removed), dtype=torch.float64)
    full[torch.from_numpy(np.flatnonzero(removed))] = values
    convolution = isinstance(layer, _CONVOLUTIONS)
    if not convolution and not isinstance(layer, nn.Linear):
        raise NotConstant(_owners(graph, end.reads, removed), f"{end.layer} ({type(layer).__name__})")
    groups = layer.groups if convolution else 1
    # Every output channel sees the constants of its own group's inputs.
    seen = full.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    taps = (weight * seen.view(*seen.shape, *[1] * (weight.dim() - 2))).sum(1)
    padded = convolution and layer.padding not in ("valid", (0,) * len(layer.kernel_size))
    if convolution and padded and layer.padding_mode != "zeros":
        # Padding that repeats the image repeats the constant too, which the adapter's map does not.
        raise NotConstant(_owners(graph, end.reads, removed), f"{end.layer} (padding_mode={layer.padding_mode!r})")
    return taps, not padded


def _owners(graph: ModelGraph, labels: IntArray | None, places: Any) -> set[str]:
    units = set(graph.units.of[labels[places]].tolist()) if labels is not None else set[int]()
    return {g.name for g in graph.groups if not units.isdisjoint(g.units.tolist())}
