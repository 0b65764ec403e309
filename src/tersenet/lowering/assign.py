"""Which kernel computes each layer of a lowered network."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.errors import GraphError, TersenetError
from tersenet.exporting.program import first_line
from tersenet.lowering.choose import Size, compiled, ranking, times_of
from tersenet.lowering.layers import CHOICES, AnyLayer, DomainLayer, has_half, is_generated
from tersenet.lowering.modules import build
from tersenet.lowering.report import LoweredLayer

_LAYER_ERROR = 1e-4
_HALF_LAYER_ERROR = 1e-2


def kernels_offered(half: bool, choice: str | None, notes: list[str], layers: Collection[AnyLayer]) -> list[str]:
    """The kernels that this machine has; why some are missing goes into `notes`."""
    offered = ["torch", "direct"]
    if not torch.backends.mkldnn.is_available():
        notes.append("this torch has no oneDNN: plain convolutions are torch's own")
        offered = ["torch"]
    for layer in layers:
        if isinstance(layer, DomainLayer) and layer.hindrance is not None:
            notes.append(f"no generated kernels for {layer.name}: {layer.hindrance}")
    asked = [choice] if choice is not None else [n for n in CHOICES if half or not n.endswith("half")]
    asked = [name for name in asked if is_generated(name)]
    if not any(layer.fits(name) for layer in layers for name in asked):
        return offered
    try:
        if not has_half() and any(name.endswith("half") for name in asked):
            notes.append("this processor does not read 16-bit weights: they are not offered")
            asked = [name for name in asked if not name.endswith("half")]
        problem = compiled((layer, name) for layer in layers for name in asked if layer.fits(name))
    except TersenetError as error:
        problem = str(error)
    if problem is not None:
        notes.append(f"no generated kernels: {problem}")
        return offered
    return [*offered, *asked]


def sizes_of(graph: fx.GraphModule, layers: dict[str, AnyLayer], inputs: tuple[Tensor, ...]) -> dict[str, Size]:
    """The size of each layer's input."""
    sizes: dict[str, Size] = {}

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
    candidates: dict[str, list[str]] = {}
    times: dict[str, dict[str, float]] = {}
    for target, layer in layers.items():
        fitting = [name for name in offered if layer.fits(name)]
        if forced is not None:
            candidates[target] = sorted(fitting, key=(forced, "direct", "torch").index)
        else:
            times[target] = times_of(layer, sizes[target], _timed(layer, fitting))
            candidates[target] = [*ranking(times[target]), "torch"]

    def hook(target: str) -> Callable[..., None]:
        def judge(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            layer, rejected = layers[target], list[str]()
            for name in candidates[target]:
                kernel = module if name == "torch" else build(layer, name, sizes[target])
                error = 0.0 if name == "torch" else distance(kernel(*args), output)
                if error <= (_HALF_LAYER_ERROR if name.endswith("half") else _LAYER_ERROR) or name == "torch":
                    graph.add_module(target, kernel)
                    density = layer.density if isinstance(layer, DomainLayer) else None
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
    return tuple(found[target] for target in layers)


def _timed(layer: AnyLayer, fitting: list[str]) -> list[str]:
    """In the Winograd domain torch is the check and the last resort: many times slower, and not worth the time."""
    generated = [name for name in fitting if is_generated(name)]
    return generated if generated and isinstance(layer, DomainLayer) else fitting


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
