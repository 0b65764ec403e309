"""Which kernel computes each layer of a lowered network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.errors import GraphError, TersenetError, first_line
from tersenet.lowering.choose import Size, compiled, described, ranking
from tersenet.lowering.contest import layers_timed
from tersenet.lowering.halves import HalfModule, narrow_results, set_narrow
from tersenet.lowering.integer_modules import in_float64
from tersenet.lowering.integers import INT8, IntegerLayer
from tersenet.lowering.layers import (
    AMX_HALF,
    CHOICES,
    AnyLayer,
    DomainLayer,
    Layer,
    has_amx,
    has_half,
    is_generated,
    needs_amx,
)
from tersenet.lowering.modules import build
from tersenet.lowering.recorded import size_at
from tersenet.lowering.report import LoweredLayer
from tersenet.lowering.timings import Times, remembered

_LAYER_ERROR = 1e-4
_HALF_LAYER_ERROR = 1e-2
_LIMITS = {name: _HALF_LAYER_ERROR for name in CHOICES if name.endswith("half")}
_LEVEL_ERROR, _TIMES = 3e-2, 4
"""Of a quantized layer, from float64: a value between two levels falls on another one. Or so many times what float32
does to it."""


def kernels_offered(half: bool, choice: str | None, notes: list[str], layers: Collection[AnyLayer]) -> list[str]:
    """The kernels that this machine has; why some are missing goes into `notes`."""
    offered = ["torch", "direct"]
    if not torch.backends.mkldnn.is_available():
        notes.append("this torch has no oneDNN: plain convolutions are torch's own")
        offered = ["torch"]
    for layer in layers:
        if isinstance(layer, (DomainLayer, IntegerLayer)) and layer.hindrance is not None:
            notes.append(f"no generated kernels for {layer.name}: {layer.hindrance}")
    asked = [choice] if choice is not None else [n for n in CHOICES if half or not n.endswith("half")]
    asked = [name for name in asked if is_generated(name)]
    if not any(layer.fits(name) for layer in layers for name in asked):
        return offered
    try:
        if not has_half() and any(name.endswith("half") for name in asked):
            notes.append("this processor does not read 16-bit weights: they are not offered")
            asked = [name for name in asked if not name.endswith("half")]
        if choice is None and not has_amx():  # most processors: nothing to say
            asked = [name for name in asked if not needs_amx(name)]
        problem = compiled((layer, name) for layer in layers for name in asked if layer.fits(name))
    except TersenetError as error:
        problem = str(error)
    if problem is not None:
        notes.append(f"no generated kernels: {problem}")
        return offered
    return [*offered, *asked]


def sizes_of(graph: fx.GraphModule, layers: dict[str, AnyLayer], inputs: tuple[Tensor, ...]) -> dict[str, Size]:
    """The size of each layer's input."""
    calls = {str(node.target): node for node in graph.graph.nodes if node.op == "call_module"}
    known = {target: size_at(calls[target].all_input_nodes[0], len(inputs[0])) for target in layers}
    sizes = {target: size for target, size in known.items() if size is not None}
    if len(sizes) == len(layers):
        return sizes

    def hook(target: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            sizes[target] = tuple(args[0].shape)

        return note

    with ExitStack() as stack:
        for target in layers:
            handle = graph.get_submodule(target).register_forward_hook(hook(target))
            stack.callback(handle.remove)
        run_graph(graph, inputs)
    return sizes


@dataclass(frozen=True)
class Judged:
    """The kernel that a layer gets, its relative L2 distance from torch's result, and better ones that are too far."""

    choice: str
    error: float
    rejected: tuple[str, ...]


class Assignment:
    """The kernels of a graph's layers: the fastest first, and the first of small error in each layer's place.

    `candidates`: the name of a layer's module -> choices from the best to the worst.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        layers: dict[str, AnyLayer],
        sizes: dict[str, Size],
        offered: list[str],
        inputs: tuple[Tensor, ...],
        forced: str | None,
    ) -> None:
        """Times are measured here, or remembered, if no choice is `forced`."""
        self._graph, self._layers, self._sizes, self._inputs = graph, layers, sizes, inputs
        self._built = {(target, "torch"): graph.get_submodule(target) for target in layers}
        half = {target for target, layer in layers.items() if AMX_HALF in offered and layer.fits(AMX_HALF)}
        self._narrow = narrow_results(graph, half)
        fitting = {target: [name for name in offered if layer.fits(name)] for target, layer in layers.items()}
        self._times: Times = {}
        if forced is not None:
            order = (forced, "direct", "torch")
            self.candidates = {target: sorted(names, key=order.index) for target, names in fitting.items()}
        else:
            self._times = self._timed(fitting)
            self.candidates = {target: [*ranking(self._times[target]), "torch"] for target in layers}

    def judged(self) -> dict[str, Judged]:
        """What each layer gets, by a pass of the plain graph: every layer is judged on what it really reads."""
        found: dict[str, Judged] = {}

        def hook(target: str) -> Callable[..., None]:
            def judge(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                found[target] = self._judge(target, args, output)

            return judge

        with ExitStack() as stack:
            for target in self._layers:
                handle = self._graph.get_submodule(target).register_forward_hook(hook(target))
                stack.callback(handle.remove)
            run_graph(self._graph, self._inputs)
        return found

    def take(self, found: Mapping[str, Judged]) -> tuple[LoweredLayer, ...]:
        """Put the kernels into the graph, and say which they are. The last thing that can be asked of it."""
        modules = {target: self._kernel(target, found[target].choice) for target in self._layers}
        for target, module in modules.items():
            self._graph.add_module(target, module)
        self._built.clear()  # packed weights that nobody runs
        narrow = set_narrow(self._graph, modules)
        rows: list[LoweredLayer] = []
        for target, layer in self._layers.items():
            one, times = found[target], self._times.get(target, {})
            density = None if isinstance(layer, (Layer, IntegerLayer)) else layer.density
            taken = (one.choice, times, one.error, density, one.rejected, target in narrow)
            rows.append(LoweredLayer(layer.name, layer.kind, self._sizes[target], *taken))
        return tuple(rows)

    def _kernel(self, target: str, name: str) -> nn.Module:
        if (target, name) not in self._built:
            module = self._built[target, name] = build(self._layers[target], name, self._sizes[target])
            if isinstance(module, HalfModule):
                module.narrow = target in self._narrow  # as if all that could took this kernel: so they are timed
        return self._built[target, name]

    def _judge(self, target: str, args: tuple[Tensor, ...], output: Tensor) -> Judged:
        layer, rejected = self._layers[target], list[str]()
        # Of a quantized layer float32 breaks ties by its own rounding errors.
        limits, wanted = _LIMITS, output
        if isinstance(layer, IntegerLayer):
            wanted = in_float64(layer, args)
            limits = {INT8: max(_LEVEL_ERROR, _TIMES * distance(output, wanted))}
        for name in self.candidates[target]:
            if name == "torch":
                break
            # The copies are for layers that write over their residual.
            copies = (x.clone() for x in args[1:])
            error = distance(self._kernel(target, name)(args[0], *copies), wanted)
            if error <= limits.get(name, _LAYER_ERROR):
                return Judged(name, error, tuple(rejected))
            rejected.append(name)
        return Judged("torch", 0.0, tuple(rejected))

    def _timed(self, fitting: dict[str, list[str]]) -> Times:
        """Of each layer's kernels, in the network; measured or remembered."""
        # Packed weights come first: a layer that has no kernel of some choice runs its first one then. Those whose
        # results may stay bfloat16 come last: all of them run in one turn, and only they read what the others leave.
        contenders = {
            target: sorted(_worth(layer, fitting[target]), key=lambda name: (name == AMX_HALF, name == "torch"))
            for target, layer in self._layers.items()
        }

        def measured() -> Times:
            kernels = {target: {n: self._kernel(target, n) for n in names} for target, names in contenders.items()}
            return layers_timed(self._graph, kernels, partial(run_graph, self._graph, self._inputs))

        network = (self._graph.code, [tuple(x.shape) for x in self._inputs])
        each = [(described(layer), self._sizes[t], contenders[t]) for t, layer in self._layers.items()]
        pairs = [(self._layers[target], name) for target, names in contenders.items() for name in names]
        return remembered("network", (network, each), contenders, measured, pairs) if self._layers else {}


def _worth(layer: AnyLayer, fitting: list[str]) -> list[str]:
    """Choices that are timed. In the Winograd domain, and of quantized layers, torch is the check and the last resort:
    many times slower, and not worth the time."""
    generated = [name for name in fitting if is_generated(name)]
    return generated if generated and isinstance(layer, (DomainLayer, IntegerLayer)) else fitting


def run_graph(graph: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Its outputs for images in channels-last memory. Raises: GraphError where it does not run on them."""
    try:
        return graph(*map(channels_last, inputs))
    except TersenetError:
        raise
    except Exception as error:
        raise GraphError(
            f"the lowered network does not run: {type(error).__name__}: {first_line(error)}. Its forward may serve one "
            "batch size only, or depend on the memory order of images, which is channels-last here"
        ) from error


def channels_last(x: Tensor) -> Tensor:
    """Images with the channels of each pixel side by side; everything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b| in float64; 0 for what is no floating point number, since ties may fall either way."""
    if not b.is_floating_point():
        return 0.0
    size = float(b.double().norm())
    apart = float((a.double() - b.double()).norm())
    return apart / size if size else apart
