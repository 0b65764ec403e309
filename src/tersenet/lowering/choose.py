"""The fastest kernel for a layer, by measured times."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.lowering.layers import AnyLayer, is_generated, rounds_more
from tersenet.lowering.modules import build
from tersenet.lowering.timings import Times, clock, for_seconds, remembered
from tersenet.measuring.turns import timed

_MARGIN = 0.95
"""A kernel of Winograd's rounds more, so it has to be faster by more than the measurement's own spread."""
_SECONDS = 0.3  # of measurement for each kernel of a layer

Size = tuple[int, ...]


def ranking(times: dict[str, float]) -> list[str]:
    """Choices from the best to the worst, by milliseconds."""
    return sorted(times, key=lambda name: times[name] / (_MARGIN if rounds_more(name) else 1))


def times_of(layer: AnyLayer, size: Size, choices: Iterable[str]) -> dict[str, float]:
    """Median milliseconds of each choice, alone, for an input of `size` (N, C, H, W), on torch's current number of
    threads; measured in turns or taken from the cache."""
    choices = sorted(choices)

    def fresh() -> Times:
        return {"": measure({choice: build(layer, choice, size) for choice in choices}, layer, size)}

    return remembered("times", (described(layer), size, choices), {"": choices}, fresh, [(layer, c) for c in choices])[
        ""
    ]


def described(layer: AnyLayer) -> tuple[object, ...]:
    """Everything of a layer that decides about times; not the weights' values."""
    return (layer.shape, layer.residual, layer.reuse, layer.activation)


def measure(kernels: dict[str, nn.Module], layer: AnyLayer, size: Size) -> dict[str, float]:
    """Median milliseconds of each kernel on noise, measured in turns."""
    inputs = [_noise(size)]
    with torch.inference_mode():
        if layer.residual:
            inputs.append(_noise(layer.output_size(size)))
        timers = {name: partial(timed, partial(kernel, *inputs), clock()) for name, kernel in kernels.items()}
        found = for_seconds(timers, _SECONDS * len(kernels))
    return {name: statistics.median(values) for name, values in found.items()}


def _noise(size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator).contiguous(memory_format=torch.channels_last)


def compiled(wanted: Iterable[tuple[AnyLayer, str]]) -> str | None:
    """Make the code of layers' generated choices; why that is not possible, or None."""
    from tersenet.kernels.compiled import kernels

    try:
        for layer, choice in wanted:
            if is_generated(choice):
                kernels(layer.algorithm(choice))
    except TersenetError as error:
        return str(error)
    return None
