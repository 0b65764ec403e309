"""Whether a lowered network is right, and faster than the network that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.errors import GraphError
from tersenet.graph.copies import copied
from tersenet.graph.passes import evaluating, tensors_in
from tersenet.lowering.assign import channels_last, distance, run_graph
from tersenet.lowering.choose import described
from tersenet.lowering.contest import passes_timed
from tersenet.lowering.layers import AnyLayer
from tersenet.lowering.report import LoweredLayer
from tersenet.lowering.timings import remembered

LOWERED, ORIGINAL, ORDERED = "lowered", "as it was", "in channels-last memory"
_LAST_DIGITS = 1e-6
_MARGIN = 0.98
"""Passes vary by about 2 %; within that a network stays lowered."""


def compared(model: nn.Module, graph: fx.GraphModule, inputs: tuple[Tensor, ...], limit: float) -> float:
    """The largest relative L2 distance of an output, for the inputs' batch and for one sample more.

    Raises: GraphError if it is above `limit`.
    """
    larger = tuple(torch.cat([x, x[:1]]) for x in inputs)
    return max(_compare(model, graph, each, limit) for each in (inputs, larger))


def _compare(model: nn.Module, graph: fx.GraphModule, inputs: tuple[Tensor, ...], limit: float) -> float:
    with evaluating(model):
        expected = tensors_in(run_graph(model, tuple(x.clone() for x in inputs)))
    outputs = tensors_in(run_graph(graph, inputs))
    pairs = list(zip(outputs, expected, strict=True))
    error = max((distance(a, b) if a.shape == b.shape else float("inf") for a, b in pairs), default=0.0)
    if not error <= limit:
        raise GraphError(
            f"the lowered {type(model).__name__} differs from the network by {error:.1e} (relative L2 distance at "
            f"batch size {len(inputs[0])}), more than the tolerance of {limit:.0e}. Try choice='F2' or 'direct', "
            "without half"
        )
    return error


def sensitivity(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The largest relative L2 distance that an output moves when inputs change in their last digits, or all is computed
    in float64: where values are rounded to few levels, some fall on the next one, and layers behind them follow. Right
    after calibration many lie between two levels, and how float32 rounds decides."""
    floats = [x.is_floating_point() for x in inputs]
    near = tuple(x * (1 + _LAST_DIGITS) if real else x for x, real in zip(inputs, floats, strict=True))
    with evaluating(model):
        before, after = (tensors_in(run_graph(model, tuple(x.clone() for x in one))) for one in (inputs, near))
        others = [after]
        with suppress(Exception):  # a network that is for float32 alone
            wide = (x.double() if real else x for x, real in zip(inputs, floats, strict=True))
            others.append(tensors_in(copied(model).double()(*wide)))
    return max((distance(a, b) for other in others for a, b in zip(other, before, strict=True)), default=0.0)


def passes(
    model: nn.Module,
    graph: fx.GraphModule,
    found: tuple[LoweredLayer, ...],
    layers: dict[str, AnyLayer],
    inputs: tuple[Tensor, ...],
) -> dict[str, float]:
    """Median milliseconds of the network lowered, as it was, and in channels-last memory; measured or remembered. Empty
    for one that can't be copied."""

    def measured() -> dict[str, dict[str, float]]:
        ordered = in_order(model)
        images = tuple(map(channels_last, inputs))
        runs: dict[str, Callable[[], Any]] = {
            LOWERED: partial(graph, *images),
            ORIGINAL: partial(model, *(x.clone() for x in inputs)),
            ORDERED: partial(ordered, *(x.clone() for x in images)),
        }
        with evaluating(model):
            return {"": passes_timed(runs)}

    chosen = [(layer, one.choice) for layer, one in zip(layers.values(), found, strict=True)]
    shapes = [tuple(x.shape) for x in inputs]
    what = (type(model).__qualname__, graph.code, shapes, [(described(layer), choice) for layer, choice in chosen])
    try:
        return remembered("passes", what, {"": [LOWERED, ORIGINAL, ORDERED]}, measured, chosen)[""]
    except GraphError:  # of a network that can't be copied: then it can't take the lowered one's place either
        return {}


def faster_than_lowered(times: dict[str, float]) -> str | None:
    """Which of the other two is clearly faster than the lowered network."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < _MARGIN * times[LOWERED] else None


def in_order(model: nn.Module) -> nn.Module:
    """A copy for inference, weights of images in channels-last memory."""
    network = copied(model).eval().requires_grad_(False)
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
