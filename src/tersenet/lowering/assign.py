"""Which kernel computes each layer of a lowered network."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import replace
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


def chosen(
    graph: fx.GraphModule,
    layers: dict[str, AnyLayer],
    sizes: dict[str, Size],
    offered: list[str],
    inputs: tuple[Tensor, ...],
    forced: str | None,
) -> tuple[LoweredLayer, ...]:
    """Put the best kernel of small error in the place of each layer, and say which."""
    found: dict[str, LoweredLayer] = {}
    built: dict[tuple[str, str], nn.Module] = {(target, "torch"): graph.get_submodule(target) for target in layers}

    def kernel(target: str, name: str) -> nn.Module:
        if (target, name) not in built:
            module = built[target, name] = build(layers[target], name, sizes[target])
            if isinstance(module, HalfModule):
                module.narrow = target in narrow  # as if all that could took this kernel: so they are timed
        return built[target, name]

    half = {target for target, layer in layers.items() if AMX_HALF in offered and layer.fits(AMX_HALF)}
    narrow = narrow_results(graph, half)
    fitting = {target: [name for name in offered if layer.fits(name)] for target, layer in layers.items()}
    times: Times = {}
    if forced is not None:
        candidates = {target: sorted(names, key=(forced, "direct", "torch").index) for target, names in fitting.items()}
    else:
        times = _times(graph, layers, sizes, fitting, inputs, kernel)
        candidates = {target: [*ranking(times[target]), "torch"] for target in layers}

    def hook(target: str) -> Callable[..., None]:
        def judge(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            layer, rejected = layers[target], list[str]()
            # Of a quantized layer float32 breaks ties by its own rounding errors.
            limits, wanted = _LIMITS, output
            if isinstance(layer, IntegerLayer):
                wanted = in_float64(layer, args)
                limits = {INT8: max(_LEVEL_ERROR, _TIMES * distance(output, wanted))}
            for name in candidates[target]:
                # The copies are for layers that write over their residual.
                copies = (x.clone() for x in args[1:])
                error = 0.0 if name == "torch" else distance(kernel(target, name)(args[0], *copies), wanted)
                if name == "torch" or error <= limits.get(name, _LAYER_ERROR):
                    graph.add_module(target, kernel(target, name))
                    density = None if isinstance(layer, (Layer, IntegerLayer)) else layer.density
                    taken = (name, times.get(target, {}), error, density, tuple(rejected))
                    found[target] = LoweredLayer(layer.name, layer.kind, sizes[target], *taken)
                    return
                rejected.append(name)

        return judge

    with ExitStack() as stack:
        # Every layer is judged on what it really reads: the plain network's activations.
        for target in layers:
            handle = graph.get_submodule(target).register_forward_hook(hook(target))
            stack.callback(handle.remove)
        run_graph(graph, inputs)
    narrow = set_narrow(graph, {target: graph.get_submodule(target) for target in layers})
    return tuple(replace(found[target], narrow=target in narrow) for target in layers)


def _times(
    graph: fx.GraphModule,
    layers: dict[str, AnyLayer],
    sizes: dict[str, Size],
    fitting: dict[str, list[str]],
    inputs: tuple[Tensor, ...],
    kernel: Callable[[str, str], nn.Module],
) -> Times:
    """Of each layer's kernels, in the network; measured or remembered."""
    # Packed weights come first: a layer that has no kernel of some choice runs its first one then. Those whose results
    # may stay bfloat16 come last: all of them run in one turn, and only they read what the others leave.
    contenders = {
        target: sorted(_timed(layer, fitting[target]), key=lambda name: (name == AMX_HALF, name == "torch"))
        for target, layer in layers.items()
    }

    def measured() -> Times:
        kernels = {target: {name: kernel(target, name) for name in names} for target, names in contenders.items()}
        return layers_timed(graph, kernels, partial(run_graph, graph, inputs))

    network = (graph.code, [tuple(x.shape) for x in inputs])
    each = [(described(layer), sizes[target], contenders[target]) for target, layer in layers.items()]
    pairs = [(layers[target], name) for target, names in contenders.items() for name in names]
    return remembered("network", (network, each), contenders, measured, pairs) if layers else {}


def _timed(layer: AnyLayer, fitting: list[str]) -> list[str]:
    """In the Winograd domain, and of quantized layers, torch is the check and the last resort: many times slower, and
    not worth the time."""
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
