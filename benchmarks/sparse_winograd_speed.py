"""Whole networks and single layers with pruned weights in the Winograd domain: time beside the dense ones.

    python -m benchmarks.sparse_winograd_speed

Networks: VGG-16 and ResNet-18 at 224 x 224, batch 1, float32, random weights: this is about time, not accuracy.
Every convolution of 3x3 with a stride of 1 but the first has its weight in the domain of F(4, 3), on maps of 7 x 7 of
F(2, 3), the ReLU too where it can move; a random quarter of the weights is left, in blocks of 16 output channels by one
input channel, and unstructured. One more has half of the channels everywhere, and 30 % of its weights in such blocks.
Each of these is also there with the linear layers of VGG-16 pruned alike, all but the last: half a gigabyte of weights.
They are lowered, and run in turns with the dense network: lowered, and on the other runtimes that are installed. Ratios
are of medians, against the best runtime that does not use Winograd's algorithm (`direct`) and against the best of all.

Layers: for each shape of both networks, the generated dense kernel beside the sparse one at falling densities, in
turns; `break_even` is the density at which both take as long, on a straight line between the nearest two.

Nothing else should run meanwhile. Writes sparse_winograd_speed.json beside this file, after each part.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.cifar_resnet import CPU
from torch import Tensor, nn

from tersenet.environment import environment, installed
from tersenet.graph.edits_sparse import Sparsify
from tersenet.graph.model import ModelGraph
from tersenet.lowering.assign import channels_last, distance
from tersenet.lowering.layers import DomainLayer, Layer
from tersenet.lowering.lower import lower
from tersenet.lowering.modules import build as kernel
from tersenet.lowering.peers import PEERS
from tersenet.measuring.turns import warm_in_turns
from tersenet.methods.base import Context
from tersenet.methods.sparse_winograd import SparseWinograd
from tersenet.models.build import build
from tersenet.nn.masked import MaskedWeight, masked_layers
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings
from tersenet.train.settings import Fit

RESULT = Path(__file__).with_suffix(".json")
IMAGE = (1, 3, 224, 224)
TILE = 4
NETWORKS = ("vgg16", "resnet18")
# Layers on maps of 7 x 7: F(4, 3) would compute 8 x 8, with 2.25 times the weights.
SMALL = {"vgg16": (), "resnet18": ("layer4.*",)}
DIRECT = ("eager", "compile", "onnxruntime", "openvino")
# Case -> share of the channels, density and block of output channels, in `LINEAR` networks without and with the linear
# layers.
HALF = "half of the channels"  # the plain network, everywhere
CASES = {
    "25 % in 16x1": (1.0, 0.25, 16),
    "25 % unstructured": (1.0, 0.25, 1),
    "half of the channels, 30 % in 16x1": (0.5, 0.3, 16),
}
TOO = ", linear layers too"
LINEAR = ("vgg16",)  # ResNet-18 has but the last
# Channels and side of the map.
SHAPES = (
    (64, 224), (128, 112), (256, 56), (512, 28), (512, 14), (64, 56), (128, 28), (256, 14), (512, 7),
)  # fmt: skip
DENSITIES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--network", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--peer", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--no-layers", action="store_true")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    packages = ("onnxruntime", "openvino", "ncnn", "MNN", "llvmlite")
    result: dict[str, Any] = {
        "claim": "time of networks and layers pruned in the Winograd domain, beside the dense ones",
        "command": " ".join(["python -m benchmarks.sparse_winograd_speed", *sys.argv[1:]]),
        "environment": {**environment("cpu"), **{name: installed(name) for name in packages}},
        "rounds": options.rounds,
        "networks": [],
        "layers": [],
    }
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("networks", partial(networks, name, count, options.rounds, options.peer))
        for name in options.network
        for count in options.threads
    ]
    if not options.no_layers:
        parts += [
            ("layers", partial(layer, *shape, block, count, options.rounds))
            for shape in SHAPES
            for block in (16, 1)
            for count in options.threads
        ]
    for part, measured in parts:
        row = measured()
        result[part].append(row)
        options.result.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)


def networks(name: str, threads: int, rounds: int, peers: list[str]) -> dict[str, Any]:
    """Medians of the dense network on every runtime and of the pruned ones, and their ratios."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    dense = build(name).eval()
    runners: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    kernels: dict[str, Any] = {}
    missing: dict[str, str] = {}

    def lowered(label: str, model: nn.Module) -> None:
        fast = lower(model, (x,))
        errors[label], kernels[label] = fast.report.error, chosen(fast.report.layers)
        ordered = channels_last(x)
        runners[label] = lambda: fast(ordered)

    lowered("dense", dense)
    lowered(HALF, build(name, width=32).eval())
    labels = ["dense", HALF]
    for label, case in CASES.items():
        for more in ("", TOO) if name in LINEAR else ("",):
            labels.append(label + more)
            lowered(label + more, pruned(name, *case, linear=bool(more)))
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        expected = dense(x)
        for peer in peers:
            try:
                runners[peer] = PEERS[peer](dense, (x,), threads, Path(folder), False)
                errors[peer] = distance(runners[peer]()[0], expected)
            except Exception as error:  # a peer's own failure is a line in the result
                runners.pop(peer, None)
                missing[peer] = str(error).strip().partition("\n")[0]
        for run in runners.values():
            run()
        times = warm_in_turns(runners, rounds)
    medians = {label: statistics.median(values) for label, values in times.items()}
    direct = {peer: medians[peer] for peer in DIRECT if peer in medians}
    all_peers = {peer: medians[peer] for peer in peers if peer in medians}
    ratios: dict[str, Any] = {}
    for label in labels:
        own: dict[str, Any] = {"of_dense_lowered": medians["dense"] / medians[label]}
        for title, known in (("of_best_direct", direct), ("of_best", all_peers)):
            if known:
                best = min(known, key=known.__getitem__)
                own[title] = {"peer": best, "times_faster": known[best] / medians[label]}
        ratios[label] = own
    return {
        "network": name,
        "threads": threads,
        "input": IMAGE,
        "ratios": ratios,
        "median_ms": medians,
        "quartiles_ms": {label: quartiles(values) for label, values in times.items()},
        "errors": errors,
        "kernels": kernels,
        "missing": missing,
    }


def pruned(name: str, width: float, density: float, block: int, linear: bool) -> nn.Module:
    """The network with a share of its channels, and a random share of its weights in the Winograd domain, and of those
    of linear layers but the last."""
    graph = ModelGraph(build(name, width=int(64 * width)).eval(), (torch.zeros(2, *IMAGE[1:]),))
    small = SMALL[name]
    steps: list[dict[str, Any]] = [{"tile": TILE, "exclude": ("position:first", *small)}]
    if small:
        steps.append({"tile": 2, "include": small})
    for step in steps:
        SparseWinograd(fit=Fit(epochs=1), others="native", **step).apply(graph, Context(CPU, 0))
    for module in graph.model.modules():
        if isinstance(module, WinogradReLUConv2d):
            module.reset("unit")
            sparse(module, density, block)
    hidden = [layer for layer, module in graph.model.named_modules() if isinstance(module, nn.Linear)][:-1]
    for layer in hidden if linear else ():
        graph.apply(Sparsify(module=layer))
        sparse(masked_layers(graph.model)[layer], density, block)
    return graph.model.eval()


def sparse(module: MaskedWeight, density: float, block: int) -> None:
    """Keep exactly int(density * blocks) blocks of the layer, drawn at random."""
    taps, inputs, outputs = module.canonical(module.weight).shape
    scores = torch.rand(taps, inputs, -(-outputs // block))
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().argsort()[: max(1, int(density * scores.numel()))]] = True
    module.make_sparse()
    module.set_mask(kept.view(scores.shape).repeat_interleave(block, 2)[..., :outputs])


def chosen(layers: Any) -> dict[str, int]:
    """How many layers each kernel computes."""
    found: dict[str, int] = {}
    for one in layers:
        found[one.choice] = found.get(one.choice, 0) + 1
    return found


def layer(channels: int, side: int, block: int, threads: int, rounds: int) -> dict[str, Any]:
    """Medians of the dense kernel, oneDNN's and the sparse one at each density, for one layer with bias and ReLU."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size = (1, channels, side, side)
    x = torch.randn(size).contiguous(memory_format=torch.channels_last)
    module = WinogradReLUConv2d(channels, channels, 3, 1, True, WinogradReLUSettings(tile=TILE))
    module.reset("unit")
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    sides = ((1, 1),) * 3
    plain = Layer("", conv.weight.detach(), conv.bias.detach(), *sides, 1, False, "relu")  # pyright: ignore
    runners: dict[str, Callable[[], Tensor]] = {}

    def add(label: str, what: DomainLayer | Layer, choice: str) -> None:
        run = kernel(what, choice, size)
        runners[label] = lambda: run(x)

    add("direct", plain, "direct")
    add("dense", domain(module), f"F{TILE}")
    for density in sorted(DENSITIES, reverse=True):
        module.mask = None
        module.reset("unit")
        sparse(module, density, block)
        add(f"{density:g}", domain(module), "scattered" if block == 1 else "sparse")
    with torch.inference_mode():
        for run in runners.values():
            run()
            run()
        times = {label: statistics.median(values) for label, values in warm_in_turns(runners, rounds).items()}
    ratios = {density: times["dense"] / times[f"{density:g}"] for density in DENSITIES}
    return {
        "channels": channels,
        "side": side,
        "block": block,
        "threads": threads,
        "break_even": break_even(ratios),
        "dense_over_sparse": ratios,
        "direct_over_sparse": {density: times["direct"] / times[f"{density:g}"] for density in DENSITIES},
        "median_ms": times,
    }


def domain(module: WinogradReLUConv2d) -> DomainLayer:
    at, _, bt = module.transforms(torch.float32)
    weight = module.weight.detach().clone()
    bias = None if module.bias is None else module.bias.detach()
    return DomainLayer("", weight, bias, at, bt, "reference", True, module.geometry, False, "relu")


def break_even(ratios: dict[float, float]) -> float | None:
    """The density at which the ratio falls to 1; None where the sparse kernel wins or loses throughout."""
    known = sorted(ratios.items())
    for (low, above), (high, below) in itertools.pairwise(known):
        if above >= 1 > below:
            return low + (high - low) * (above - 1) / (above - below)
    return None


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (low, high)


if __name__ == "__main__":
    main()
