"""The constants that removed channels emit: measured by running the traced operators, pushed through the next layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from tersenet.graph.labels import End, IntArray
from tersenet.graph.model import ModelGraph, NDArrayBool, random_like
from tersenet.graph.precision import full_float32

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class NotConstant(Exception):
    """Removed channels of these groups reach a layer with values that no bias can replace."""

    def __init__(self, groups: set[str], place: str) -> None:
        super().__init__(place)
        self.groups = groups


def measure_constants(graph: ModelGraph, gone: NDArrayBool, scattered: set[int]) -> dict[int, Tensor]:
    """End -> the constants (float64, one per removed channel) that it reads, or that a scatter point emits."""
    of = graph.units.of
    wanted: dict[Node, list[tuple[int, IntArray, bool]]] = {}
    for index, end in enumerate(graph.ends):
        labels = end.labels if index in scattered else end.reads
        if labels is None or (end.role != "consume" and index not in scattered):
            continue
        places = np.flatnonzero(gone[of[labels]])
        for node in end.nodes if len(places) else []:
            wanted.setdefault(node, []).append((index, places, index in scattered))
    low: dict[int, Tensor] = {}
    high: dict[int, Tensor] = {}
    for seed in (1, 2):
        for index, values in _Probe(graph, wanted).collect(random_like(graph.example, seed)):
            bottom, top = values.amin(1), values.amax(1)
            low[index] = torch.minimum(low.get(index, bottom), bottom)
            high[index] = torch.maximum(high.get(index, top), top)
    for index, bottom in low.items():
        spread = high[index] - bottom
        if bool((spread > 1e-5 * high[index].abs().max().clamp_min(1e-12)).any()):
            end = graph.ends[index]
            labels = end.labels if index in scattered else end.reads
            bad = np.flatnonzero(gone[of[labels]])[(spread > 0).numpy()]
            raise NotConstant(_owners(graph, labels, bad), end.layer)
    return {index: (low[index] + high[index]) / 2 for index in low}


class _Probe(Interpreter):
    """Runs the traced operators with the model's present weights and looks at some of their inputs and outputs."""

    def __init__(self, graph: ModelGraph, wanted: dict[Node, list[tuple[int, IntArray, bool]]]) -> None:
        super().__init__(graph.trace.program.graph_module)
        self.graph_of = graph
        self.wanted = {node.name: ends for node, ends in wanted.items()}
        self.seen: list[tuple[int, Tensor]] = []

    def collect(self, inputs: tuple[Any, ...]) -> list[tuple[int, Tensor]]:
        """(end, values (channels, everything else)) for every wanted end."""
        trace = self.graph_of.trace
        constants = trace.program.graph_signature.inputs_to_lifted_tensor_constants
        users = dict(zip(trace.inputs, inputs, strict=True))
        args: list[Any] = []
        for node in trace.nodes:
            if node.op != "placeholder":
                continue
            if node.name in trace.tensors:
                args.append(self.graph_of.tensor(trace.tensors[node.name]))
            elif node.name in users:
                args.append(users[node.name])
            else:
                args.append(trace.program.constants[constants[node.name]])
        with torch.no_grad(), full_float32():
            self.run(*args)
        return self.seen

    def run_node(self, n: Node) -> Any:
        ends = self.wanted.get(n.name, [])
        axis = -1 if "linear" in str(n.target) else 1
        for index, places, behind in ends:
            if not behind:
                source: Any = n.args[0]
                self._look(index, places, self.env[source], axis)
        result = super().run_node(n)
        for index, places, behind in ends:
            if behind:
                self._look(index, places, result, axis)
        return result

    def _look(self, index: int, places: IntArray, value: Tensor, axis: int) -> None:
        chosen = value.detach().index_select(axis, torch.from_numpy(places).to(value.device))
        self.seen.append((index, chosen.movedim(axis, 0).flatten(1).double().cpu()))


def push_through(graph: ModelGraph, end: End, gone: NDArrayBool, values: Tensor) -> tuple[Tensor, bool]:
    """What a layer makes of constants on its removed inputs, and whether that is the same everywhere (no padding).

    Returns (C_out, kH, kW), one value per kernel tap; (C_out,) for a linear layer.

    Raises:
        NotConstant: a layer or a padding mode for which there is no such value.
    """
    layer = graph.model.get_submodule(end.layer)
    removed = gone[graph.units.of[end.reads]]
    weight = graph.tensor(end.tensors[0]).detach().double().cpu()
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
