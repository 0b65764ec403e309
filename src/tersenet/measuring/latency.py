"""Wall time of a forward pass: median and quartiles, and comparisons that slow drift of the machine can't bend."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.graph import copies
from tersenet.measuring.meta import call, map_tensors, tensors_in
from tersenet.measuring.turns import called_in_turns
from tersenet.results import Latency

RUNS = 30
WARMUP = 5


def latency(model: nn.Module, example: Any, *, runs: int = RUNS, warmup: int = WARMUP) -> Latency:
    """The time of one forward of `example` on the model's device, in inference mode. See `compare`.

    Raises: TersenetError for runs < 1 or warmup < 0.
    """
    return compare({"model": model}, example, runs=runs, warmup=warmup)["model"]


def compare(
    models: dict[str, nn.Module], example: Any, *, runs: int = RUNS, warmup: int = WARMUP
) -> dict[str, Latency]:
    """The time of one forward of `example` for each model, measured in turns: every round runs each model once, and
    each round starts with another one. A machine that slows down half-way slows all of them.

    Runs eval-mode copies, 4-d inputs and weights in channels_last layout; the models stay as they are. Threads are
    torch's current number.

    Raises: TersenetError for runs < 1 or warmup < 0.
    """
    if runs < 1 or warmup < 0:
        raise TersenetError(f"latency needs runs (={runs}) of at least 1 and warmup (={warmup}) of at least 0")
    prepared = {name: _prepare(model, example) for name, model in models.items()}
    with torch.inference_mode():
        times = called_in_turns({name: partial(_time, *ready) for name, ready in prepared.items()}, warmup + runs)
    return {name: _summary(times[name][warmup:], example, prepared[name][2]) for name in prepared}


_Prepared = tuple[nn.Module, Any, torch.device]


def _prepare(model: nn.Module, example: Any) -> _Prepared:
    """A copy of the model ready to run, the example in its place, and where that is."""
    weight = next(iter([*model.parameters(), *model.buffers()]), None)
    device = weight.device if weight is not None else torch.device("cpu")
    copied = copies.copied(model).eval()
    if any(tensor.dim() == 4 for tensor in tensors_in(example)):
        copied = copied.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (torch's stub lacks it)
    return copied, map_tensors(lambda tensor: _place(tensor, device), example), device


def _place(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device)
    return moved.contiguous(memory_format=torch.channels_last) if moved.dim() == 4 else moved


def _time(model: nn.Module, example: Any, device: torch.device) -> float:
    """Milliseconds of one forward, with the work that it left running on an accelerator."""
    _wait(device)
    start = time.perf_counter_ns()
    call(model, example)
    _wait(device)
    return (time.perf_counter_ns() - start) / 1e6


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _summary(times: list[float], example: Any, device: torch.device) -> Latency:
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    inputs = tensors_in(example)
    return Latency(
        median_ms=float(median),
        low_ms=float(low),
        high_ms=float(high),
        runs=len(times),
        batch=inputs[0].shape[0] if inputs and inputs[0].dim() else 1,
        threads=torch.get_num_threads(),
        device=str(device),
    )
