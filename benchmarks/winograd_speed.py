"""Single 3x3 convolutions on the generated kernels, Winograd's and AMX's, beside PyTorch's and oneDNN's, packed.

    python -m benchmarks.winograd_speed --threads 1 2

A row is three equal layers with bias and ReLU behind each other, each with a weight of its own, so that weights come
from as far as in a network; times are a third of that. Contenders run in turns, passes for 0.2 seconds before each
timed one, so that it is one of many; `first_ms` is a single pass straight behind another contender's, of whose memory
the second-level cache is full. They are `eager`, which packs its weight anew in every call, `direct`, oneDNN with the
weight packed once, on one thread ncnn and MNN where they are installed, which have Winograd kernels too (on two, their
threads wait actively and slow down all others), F2, F4 and F6, and `amx`, `F2 amx` and `F4 amx` where the processor has
it; `direct bf16` and `amx half` are bfloat16, between layers too, `F2 amx half` in its products alone; they are
compared with each other only. On one thread processor time counts, else wall time. `gflops` counts the direct
convolution's operations for every contender, and `error` is the relative L2 distance of the third layer's result from
float64.

Nothing else should run meanwhile. Writes winograd_speed.json beside this file after each row; a row that is in it, from
the same environment, is not measured again. Six minutes for each number of threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.environment import environment, installed
from tersenet.lowering.halves import HalfModule
from tersenet.lowering.layers import AMX_HALF, Layer, has_amx
from tersenet.lowering.modules import build
from tersenet.lowering.peers import PEERS
from tersenet.measuring.turns import in_turns, warm_in_turns

RESULT = Path(__file__).with_suffix(".json")
DEPTH = 3
CHOICES = {"eager": "torch", "direct": "direct", "F2": "F2", "F4": "F4", "F6": "F6"}
PEERS_WITH_WINOGRAD = ("ncnn", "mnn")
ON_AMX = ("amx", "F2 amx", "F4 amx", "amx half", "F2 amx half", "direct bf16")
# Images, channels and side of the map: the layers of ResNet-18 and VGG-16, and some of them for eight images.
SHAPES = (
    (1, 64, 56), (1, 128, 28), (1, 256, 14), (1, 512, 7),
    (1, 64, 224), (1, 128, 112), (1, 256, 56), (1, 512, 28), (1, 512, 14),
    (8, 64, 56), (8, 128, 28), (8, 256, 14), (8, 512, 7), (8, 512, 14),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9, help="for each row")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    versions = {name: installed(name) for name in ("llvmlite", "ncnn", "MNN")}
    where = {**environment("cpu"), **versions, "threads": max(options.threads)}
    result: dict[str, Any] = {
        "claim": "time of single 3x3 convolutions by Winograd's algorithm, beside direct ones",
        "command": " ".join(["python -m benchmarks.winograd_speed", *sys.argv[1:]]),
        "environment": where,
        "rows": [],
    }
    if options.result.exists():
        before = json.loads(options.result.read_text())
        if before["environment"] == where:
            result["rows"] = before["rows"]
    done = {(row["threads"], row["images"], row["channels"], row["side"]) for row in result["rows"]}
    for threads, shape in itertools.product(options.threads, SHAPES):
        if (threads, *shape) not in done:
            torch.set_num_threads(threads)
            row = {"threads": threads} | measured(*shape, options.rounds)
            result["rows"].append(row)
            options.result.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(row), flush=True)


def measured(images: int, channels: int, side: int, rounds: int) -> dict[str, Any]:
    """Medians and quartiles of every contender for one shape, and ratios of medians."""
    torch.manual_seed(0)
    size = (images, channels, side, side)
    x = torch.randn(size).contiguous(memory_format=torch.channels_last)
    one, bound = (1, 1), math.sqrt(2 / 9 / channels)
    layers = [
        Layer("", bound * torch.randn(channels, channels, 3, 3), torch.randn(channels), one, one, one, 1, False, "relu")
        for _ in range(DEPTH)
    ]
    clock = time.process_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        exact = x.double()
        for layer in layers:
            assert layer.bias is not None
            exact = F.conv2d(exact, layer.weight.double(), layer.bias.double(), padding=1).relu_()
        runners: dict[str, Callable[[], Tensor]] = {}
        for name, choice in {**CHOICES, **({one: one for one in ON_AMX} if has_amx() else {})}.items():
            if choice == AMX_HALF:
                halves = [build(layer, choice, size) for layer in layers]
                for module in halves:
                    assert isinstance(module, HalfModule)
                    module.narrow = True
                runners[name] = chain(halves, x.bfloat16())
            elif name == "direct bf16":
                rounded = [replace(layer, weight=layer.weight.bfloat16()) for layer in layers]
                runners[name] = chain([build(layer, "direct", size) for layer in rounded], x.bfloat16())
            else:
                runners[name] = chain([build(layer, choice, size) for layer in layers], x)
        if torch.get_num_threads() == 1:
            runners |= peers(layers, x, Path(folder))
        errors = {name: float((run() - exact).norm() / exact.norm()) for name, run in runners.items()}
        found = {name: [t / DEPTH for t in taken] for name, taken in warm_in_turns(runners, rounds, clock).items()}
        first = {name: statistics.median(taken) / DEPTH for name, taken in in_turns(runners, rounds, clock).items()}
    times = {name: statistics.median(taken) for name, taken in found.items()}
    winograd = min(("F2", "F4", "F6"), key=times.__getitem__)
    best = min((winograd, *ON_AMX[:3]), key=lambda name: times.get(name, math.inf))
    others = [name for name in ("eager", "direct", *PEERS_WITH_WINOGRAD) if name in times]
    operations = 2 * 9 * images * channels**2 * side**2
    return {
        "images": images,
        "channels": channels,
        "side": side,
        "rounds": rounds,
        "median_ms": times,
        "first_ms": first,
        "quartiles_ms": {name: statistics.quantiles(taken, n=4)[::2] for name, taken in found.items()},
        "gflops": {name: operations / taken / 1e6 for name, taken in times.items()},
        "best": best,
        "best_winograd": winograd,
        "times_faster": {name: times[name] / times[best] for name in others},
        "winograd_times_faster": {name: times[name] / times[winograd] for name in others},
        "half_times_faster": {
            name: times["direct bf16"] / times[name] for name in ("amx half", "F2 amx half") if name in times
        },
        "error": errors,
    }


def peers(layers: list[Layer], x: Tensor, folder: Path) -> dict[str, Callable[[], Tensor]]:
    """The same layers on the runtimes that are installed."""
    found: dict[str, Callable[[], Tensor]] = {}
    with torch.inference_mode(False):
        network = nn.Sequential()
        for layer in layers:
            outputs, inputs = layer.weight.shape[:2]
            plain = nn.Conv2d(inputs, outputs, 3, padding=1).requires_grad_(False)
            plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
            network.extend([plain, nn.ReLU()])
    for name in PEERS_WITH_WINOGRAD:
        if find_spec("MNN" if name == "mnn" else name) is not None:
            run = PEERS[name](network.eval(), (x.contiguous(),), torch.get_num_threads(), folder, False)
            found[name] = lambda run=run: run()[0]
    return found


def chain(modules: list[nn.Module], x: Tensor) -> Callable[[], Tensor]:
    """All of them, one behind the other, on `x`."""

    def run() -> Tensor:
        y = x
        for module in modules:
            y = module(y)
        return y

    return run


if __name__ == "__main__":
    main()
