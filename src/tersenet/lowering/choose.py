"""The fastest kernel for a layer: measured on this machine, once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from tersenet.environment import installed, processor
from tersenet.errors import TersenetError
from tersenet.kernels import cache
from tersenet.kernels.compiled import key as key_of_code
from tersenet.lowering.layers import AnyLayer, is_generated
from tersenet.lowering.modules import build
from tersenet.measuring.turns import called_in_turns, timed

_MARGIN = 0.95
"""A kernel of Winograd's rounds more, so it has to be faster by more than the measurement's own spread."""
_SECONDS = 0.3  # of measurement for each kernel of a layer, within the bounds below
_ROUNDS = (5, 40)
_WARMUP = 2

Size = tuple[int, ...]


def ranking(times: dict[str, float]) -> list[str]:
    """Choices from the best to the worst, by milliseconds."""
    return sorted(times, key=lambda name: times[name] / (_MARGIN if is_generated(name) else 1))


def times_of(layer: AnyLayer, size: Size, choices: Iterable[str]) -> dict[str, float]:
    """Median milliseconds of each choice for an input of `size` (N, C, H, W), on torch's current number of threads;
    measured in turns or taken from the cache."""
    choices = sorted(choices)
    key = _key(layer, size, choices)
    name = f"times-{hashlib.sha256(key).hexdigest()[:24]}"
    kept = _read(cache.read(name, key), choices)
    if kept is None:
        kept = measure({choice: build(layer, choice, size) for choice in choices}, layer, size)
        cache.write(name, key, json.dumps(kept).encode())
    return kept


def measure(kernels: dict[str, nn.Module], layer: AnyLayer, size: Size) -> dict[str, float]:
    """Median milliseconds of each kernel on noise, measured in turns."""
    inputs = [_noise(size)]
    with torch.inference_mode():
        if layer.residual:
            inputs.append(_noise(layer.output_size(size)))
        first = {name: min(_time(kernel, inputs) for _ in range(_WARMUP)) for name, kernel in kernels.items()}
        rounds = min(_ROUNDS[1], max(_ROUNDS[0], int(_SECONDS * 1e3 / max(*first.values(), 1e-3))))
        found = called_in_turns({name: partial(_time, kernel, inputs) for name, kernel in kernels.items()}, rounds)
    return {name: statistics.median(values) for name, values in found.items()}


def _time(kernel: nn.Module, inputs: list[Tensor]) -> float:
    # On one thread the time of the processor counts: other programs on the machine don't change it.
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    return timed(partial(kernel, *inputs), clock)


def _noise(size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator).contiguous(memory_format=torch.channels_last)


def _key(layer: AnyLayer, size: Size, choices: list[str]) -> bytes:
    """Everything that decides about times: machine, versions, shapes, threads; not the weights' values."""
    what = (layer.shape, layer.residual, layer.activation, tuple(size), torch.get_num_threads())
    code = [key_of_code(layer.algorithm(choice)) for choice in choices if is_generated(choice)]
    versions = (torch.__version__, torch.backends.cpu.get_cpu_capability(), installed("tersenet"))
    return repr((processor(), versions, code, what, choices)).encode()


def _read(data: bytes | None, choices: list[str]) -> dict[str, float] | None:
    """What `cache.read` found whole; None if it is not what this version writes."""
    if data is None:
        return None
    try:
        kept = json.loads(data)
    except ValueError:
        return None
    if not isinstance(kept, dict) or sorted(kept) != choices:
        return None
    return kept if all(isinstance(value, float) and value > 0 for value in kept.values()) else None


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
