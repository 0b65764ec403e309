"""One network on the runtimes that are installed: the same outputs, timed in turns."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.environment import environment, installed
from tersenet.errors import TersenetError, UnknownNameError, first_line
from tersenet.graph.copies import copied
from tersenet.graph.passes import tensors_in
from tersenet.lowering.assign import channels_last, distance
from tersenet.lowering.lower import Lowered, lower
from tersenet.lowering.peers import PEERS, Runner
from tersenet.measuring.turns import warm_in_turns


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a pass: median and quartiles. `error`: relative L2 distance from eager's outputs."""

    median_ms: float
    low_ms: float
    high_ms: float
    error: float


@dataclass(frozen=True)
class Bench:
    """Every runtime that ran, and why others did not."""

    timings: dict[str, Timing]
    missing: dict[str, str]
    batch: int
    threads: int
    rounds: int
    half: bool
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def title(self) -> str:
        """Such as `batch 8, 2 threads`."""
        return f"batch {self.batch}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def bench(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    peers: Sequence[str] = ("eager", "onnxruntime", "openvino", "ncnn", "mnn"),
    threads: int | None = None,
    rounds: int = 30,
    half: bool = False,
) -> tuple[Bench, Lowered]:
    """`model` lowered, against `peers`, all float32, or with `half` bfloat16, and on the same number of threads.

    Every round gives each a turn, and starts with another one. A turn is passes for a fifth of a second and then one
    that is timed: by then the threads of the runtime before it sleep, and its own weights are where a loop of passes
    finds them. Weights are packed and memory is channels-last before time is taken, where a runtime can do that.

    Raises:
        TersenetError: an unknown peer, rounds or threads below 1.
        GraphError: the network can't be lowered.
    """
    for peer in peers:
        if peer not in PEERS:
            raise UnknownNameError("runtime", peer, PEERS, f"Known: {', '.join(PEERS)}")
    if rounds < 1 or (threads is not None and threads < 1):
        raise TersenetError(f"rounds (={rounds}) and threads (={threads}) must be at least 1")
    before = torch.get_num_threads()
    used = threads or before
    torch.set_num_threads(used)
    try:
        fast = lower(model, inputs, half=half)
        eager = copied(model).eval()
        ordered = tuple(map(channels_last, inputs))
        with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            expected = tensors_in(eager(*inputs))
            runners: dict[str, Runner] = {"tersenet": lambda: tensors_in(fast(*ordered))}
            missing: dict[str, str] = {}
            for peer in dict.fromkeys(peers):
                try:
                    runners[peer] = PEERS[peer](eager, inputs, used, Path(folder), half)
                    runners[peer]()
                except Exception as error:  # a peer's own failure is a line in the table
                    runners.pop(peer, None)
                    missing[peer] = first_line(error)
            errors = {name: _error(run(), expected) for name, run in runners.items()}
            times = warm_in_turns(runners, rounds)
    finally:
        torch.set_num_threads(before)
    timings = {name: _timing(times[name], errors[name]) for name in runners}
    where = {**environment("cpu"), **{name: installed(name) for name in ("onnxruntime", "openvino", "ncnn", "MNN")}}
    return Bench(timings, missing, len(inputs[0]), used, rounds, half, {**where, "threads": used}), fast


def _timing(times: list[float], error: float) -> Timing:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
    return Timing(statistics.median(times), low, high, error)


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    return max((distance(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
