"""Time, memory and kept bytes of a Winograd layer's training step beside nn.Conv2d's; and of a whole ResNet-18's.

    python -m benchmarks.winograd_layer

The layer: N = 32, 64 to 64 channels, 32x32, forward and backward, on one thread. `peak`: the most bytes that the step
has allocated at once, beside what was there before it. `kept`: bytes that forward leaves for backward. Each round runs
every layer once and starts with another one; ratios are of medians, against nn.Conv2d in the same rounds.

The network: winograd_resnet18 (width 64) at N = 32, its 16 layers swapped.

Writes winograd_layer.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.environment import environment
from tersenet.graph.model import ModelGraph
from tersenet.measuring.turns import in_turns
from tersenet.methods.winograd_aware import WinogradSwap
from tersenet.models.build import build
from tersenet.nn.winograd import WinogradConv2d
from tersenet.nn.winograd_settings import Flex, Quantization, WinogradSettings

RESULT = Path(__file__).with_suffix(".json")
N, CHANNELS, SIDE = 32, 64, 32
EIGHT = {"per tensor": Quantization.reference(8), "per tap": Quantization.tapwise(8)}
LEARNED = EIGHT["per tap"].model_copy(
    update={
        name: getattr(EIGHT["per tap"], name).model_copy(update={"scale": "learned"})
        for name in ("input", "weight", "input_winograd", "weight_winograd", "product", "output")
    }
)
Case = tuple[int, Flex, Quantization | None]
CASES: dict[str, Case] = {
    "F4 flex, 8 bits per tensor": (4, "full", EIGHT["per tensor"]),
    "F4 flex, 8 bits per tap": (4, "full", EIGHT["per tap"]),
    "F4 static, 8 bits per tensor": (4, "static", EIGHT["per tensor"]),
    "F4 static, 8 bits per tap": (4, "static", EIGHT["per tap"]),
    "F4 flex, 8 bits per tap, learned scales": (4, "full", LEARNED),
    "F4 static, floating point": (4, "static", None),
    "F4 flex, floating point": (4, "full", None),
    "F2 flex, 8 bits per tap": (2, "full", EIGHT["per tap"]),
    "F2 static, floating point": (2, "static", None),
    "F6 flex, 8 bits per tap": (6, "full", EIGHT["per tap"]),
    "F6 static, floating point": (6, "static", None),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "F4 flex, 8 bits per tap": {"tile": 4, "flex": "full"},
    "F4 static, floating point": {"tile": 4, "bits": None},
    "direct, 8 bits": {"tile": "direct"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", nargs="*", help="cases whose names have all of these words")
    parser.add_argument("--no-network", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    words = options.only or []
    result: dict[str, Any] = {
        "claim": "training step of Winograd layers beside nn.Conv2d, N=32, 64 to 64 channels, 32x32",
        "rounds": options.rounds,
        "layer": layers({k: v for k, v in CASES.items() if all(word in k for word in words)}, options.rounds),
    }
    if not options.no_network:
        result["resnet18"] = networks(max(3, options.rounds // 4))
    result |= {"environment": environment("cpu"), "command": "python -m benchmarks.winograd_layer"}
    if not words and not options.no_network:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def layers(cases: dict[str, Case], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
    x = torch.randn(N, CHANNELS, SIDE, SIDE).relu().requires_grad_()
    made: dict[str, nn.Module] = {"nn.Conv2d": conv}
    for name, (tile, flex, quantization) in cases.items():
        settings = WinogradSettings(tile=tile, flex=flex, quantization=quantization)
        made[name] = WinogradConv2d.from_conv(conv, settings).train()
    whole = x.nbytes + conv.weight.nbytes
    return measured(made, x, rounds, whole)


def networks(rounds: int) -> dict[str, Any]:
    """Of the whole network, first and linear layer included."""
    torch.manual_seed(0)
    x = torch.randn(N, 3, 32, 32)
    made: dict[str, nn.Module] = {"nn.Conv2d": build("winograd_resnet18").train()}
    for name, settings in NETWORKS.items():
        model = build("winograd_resnet18").eval()
        graph, method = ModelGraph(model, (x[:2],)), WinogradSwap.model_validate(settings)
        for edit in method.plan(graph, method.quantization).edits:
            graph.apply(edit)
        made[name] = model.train()
    return measured(made, x, rounds)


def measured(made: dict[str, nn.Module], x: Tensor, rounds: int, whole: int | None = None) -> dict[str, Any]:
    steps = {name: step_of(module, x) for name, module in made.items()}
    for step in steps.values():
        step()
        step()
    # On one thread the processor's time: other programs don't count.
    times = in_turns(steps, rounds, time.thread_time_ns)
    medians = {name: statistics.median(values) for name, values in times.items()}
    peaks = {name: peak(step) for name, step in steps.items()}
    found: dict[str, Any] = {}
    for name, module in made.items():
        row: dict[str, Any] = {
            "ms": medians[name],
            "time_ratio": medians[name] / medians["nn.Conv2d"],
            "peak_bytes": peaks[name],
        }
        row["quartiles_ms"] = [statistics.quantiles(times[name], n=4)[i] for i in (0, 2)]
        row |= {"peak_ratio": peaks[name] / peaks["nn.Conv2d"]}
        kept = kept_bytes(module, x)
        row |= {"kept_bytes": kept} | ({"kept_ratio": kept / whole} if whole is not None else {})
        found[name] = row
    return found


def step_of(module: nn.Module, x: Tensor) -> Callable[[], None]:
    gradient: list[Tensor] = []

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        y = module(x)
        if not gradient:
            gradient.append(torch.randn_like(y))
        y.backward(gradient[0])

    return step


def peak(step: Callable[[], None]) -> int:
    """The most bytes above those at the beginning."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    now = most = 0
    results: Any = profile.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Of everything that forward saves for backward, each storage once; parameters included."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(seen.values())


if __name__ == "__main__":
    main()
