"""3x3 convolutions and whole networks on Triton's Winograd kernels, beside cuDNN. Needs a GPU.

    python -m benchmarks.triton_winograd

Layers: a row is three equal layers with bias and ReLU behind each other, each with a weight of its own; times are a
third of that. Networks: ResNet-18 and VGG-16 at 224 x 224, random weights, as they are and lowered with one choice for
all layers that it fits. Batches of 1, 8 and 64; float32 without TF32, float32 with TF32 on both sides, float16 and
bfloat16; always the same precision on both sides, but for `tf32x3`, float32 by three TF32 products, which stands beside
cuDNN's float32. cuDNN chooses its own algorithm (cudnn.benchmark), with channels last and first, with and without bias
and ReLU fused into it (`fused`, by torch.cudnn_convolution_relu).

`graph_ms`: device time of a replay of the contender's CUDA graph, by events around enough replays to fill
five milliseconds, in turns, median of --rounds. `call_ms`: the same without a graph, started from Python. `error`:
relative L2 distance of the first image's result from float64. `times_faster`: the best of cuDNN over the best of ours,
by `graph_ms`.

Nothing else should use the GPU meanwhile. Writes triton_winograd.json beside this file after each row; rows that are
in it, from the same environment, are not measured again. Triton compiles each kernel at its first use, some minutes in
all, and keeps it in its cache.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.environment import environment
from tersenet.errors import TersenetError
from tersenet.kernels.gpu.host import interpreted, problem
from tersenet.kernels.gpu.operator import gpu_winograd_conv2d
from tersenet.kernels.gpu.pack import GpuAlgorithm, pack_gpu
from tersenet.kernels.gpu.timing import timed
from tersenet.lowering.lower import lower
from tersenet.measuring.turns import called_in_turns
from tersenet.models.build import build

RESULT = Path(__file__).with_suffix(".json")
DEPTH = 3
# Channels and side of the map: the layers of ResNet-18 and VGG-16.
SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7), (64, 224), (128, 112), (256, 56), (512, 28), (512, 14))
BATCHES = (1, 8, 64)
NETWORKS = ("resnet18", "vgg16")
KINDS: dict[str, tuple[torch.dtype, dict[str, tuple[int, str]]]] = {
    "float32": (torch.float32, {
        "F2": (2, "triton"), "F4": (4, "triton"), "F6": (6, "triton"),
        "F2 tf32x3": (2, "triton-tf32x3"), "F4 tf32x3": (4, "triton-tf32x3"),
    }),
    "tf32": (torch.float32, {"F2 tf32": (2, "triton-tf32"), "F4 tf32": (4, "triton-tf32")}),
    "float16": (torch.float16, {"F2": (2, "triton"), "F4": (4, "triton")}),
    "bfloat16": (torch.bfloat16, {"F2": (2, "triton"), "F4": (4, "triton")}),
}  # fmt: skip
# Of lowered networks. TF32 is no choice there: its error is more than lowering lets pass.
CHOICES = {"float32": ("F2", "F4", "F2 tf32x3", "F4 tf32x3"), "float16": ("F2", "F4"), "bfloat16": ("F2",)}
_FILL_MS = 5.0
Run = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="for each row")
    parser.add_argument("--batch", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--kind", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--network", nargs="*", default=NETWORKS)
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    if interpreted() or problem() is not None:
        raise SystemExit(f"benchmarks.triton_winograd needs a GPU: {problem() or 'unset TRITON_INTERPRET'}")
    where = here()
    result: dict[str, Any] = {
        "claim": "time of 3x3 convolutions, and of networks, on Triton's Winograd kernels beside cuDNN",
        "command": " ".join(["python -m benchmarks.triton_winograd", *sys.argv[1:]]),
        "environment": where,
        "rows": [],
    }
    if options.result.exists():
        before = json.loads(options.result.read_text())
        if before["environment"] == where:
            result["rows"] = before["rows"]
    done = {(row["what"], row["kind"], row["images"]) for row in result["rows"]}
    layers = [f"{channels}@{side}" for channels, side in SHAPES]
    torch.backends.cudnn.benchmark = True
    for kind, images, what in itertools.product(options.kind, options.batch, [*layers, *options.network]):
        if (what, kind, images) in done or (what in options.network and kind not in CHOICES):
            continue
        measure = network if what in options.network else layer
        with torch.no_grad(), precision(kind == "tf32"):
            row = {"what": what, "kind": kind, "images": images, "rounds": options.rounds}
            row |= measure(what, kind, images, options.rounds)
        result["rows"].append(row)
        options.result.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(row), flush=True)
        torch.cuda.empty_cache()


def here() -> dict[str, Any]:
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        **environment("cuda"),
        "triton": importlib.import_module("triton").__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
    }


@contextmanager
def precision(tf32: bool) -> Generator[None]:
    """Of float32 convolutions and products of matrices in torch."""
    places = [getattr(torch.backends.cudnn, "conv"), torch.backends.cuda.matmul]  # noqa: B009
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            place.fp32_precision = old


def layer(what: str, kind: str, images: int, rounds: int) -> dict[str, Any]:
    """Every contender for three layers of one shape."""
    channels, side = map(int, what.split("@"))
    dtype, ours = KINDS[kind]
    torch.manual_seed(0)
    x = torch.randn(images, channels, side, side, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    weights = [math.sqrt(2 / 9 / channels) * torch.randn(channels, channels, 3, 3, device="cuda") for _ in range(DEPTH)]
    biases = [torch.randn(channels, device="cuda") for _ in range(DEPTH)]
    exact = x[:1].double()
    for weight, bias in zip(weights, biases, strict=True):
        exact = F.conv2d(exact, weight.double(), bias.double(), padding=1).relu_()
    runs: dict[str, Run] = {}
    for order, memory in (("", torch.channels_last), (" channels first", torch.contiguous_format)):
        own = [
            (w.to(dtype).contiguous(memory_format=memory), b.to(dtype)) for w, b in zip(weights, biases, strict=True)
        ]
        runs[f"cudnn{order}"] = partial(chain, x.contiguous(memory_format=memory), [partial(plain, *o) for o in own])
        runs[f"cudnn fused{order}"] = partial(
            chain, x.contiguous(memory_format=memory), [partial(fused, *o) for o in own]
        )
    for name, (m, isa) in ours.items():
        algorithm = GpuAlgorithm(m, dtype, isa)
        packed = [pack_gpu(w, b, algorithm, "cuda") for w, b in zip(weights, biases, strict=True)]
        called = [lambda y, one=one: gpu_winograd_conv2d(y, one, (1, 1), None, "relu") for one in packed]
        runs[name] = partial(chain, x, called)
    found = compared(runs, exact, rounds, DEPTH)
    operations = 2 * 9 * images * channels**2 * side**2
    tflops = {name: operations / taken / 1e9 for name, taken in found["graph_ms"].items()}
    return {**found, "tflops": tflops}


def plain(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1).relu_()


def fused(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    one = [1, 1]
    return torch.cudnn_convolution_relu(x, weight, bias, one, one, one, 1)  # pyright: ignore


def chain(x: Tensor, called: list[Callable[[Tensor], Tensor]]) -> Tensor:
    for one in called:
        x = one(x)
    return x


def network(what: str, kind: str, images: int, rounds: int) -> dict[str, Any]:
    """A network as it is, and lowered."""
    torch.manual_seed(0)
    dtype = KINDS[kind][0]
    net: nn.Module = build(what).eval().to("cuda", dtype)
    x = torch.randn(images, 3, 224, 224, device="cuda", dtype=dtype)
    ordered: nn.Module = build(what).eval()
    ordered.load_state_dict(net.state_dict())
    ordered = ordered.to("cuda", dtype).to(memory_format=torch.channels_last)  # pyright: ignore
    last = x.contiguous(memory_format=torch.channels_last)
    runs: dict[str, Run] = {"cudnn": partial(ordered, last), "cudnn channels first": partial(net, x)}
    problems: dict[str, str] = {}
    for name, choice in {"cudnn folded": "torch", **{name: name for name in CHOICES[kind]}, "lowered": None}.items():
        try:
            runs[name] = partial(lower(net, x, choice=choice), last)
        except TersenetError as error:
            problems[name] = str(error)
    exact = copy.deepcopy(net).double()(x[:1].double())
    found = compared(runs, exact, rounds, 1)
    return {**found, "problems": {**found["problems"], **problems}}


def compared(runs: dict[str, Run], exact: Tensor, rounds: int, depth: int) -> dict[str, Any]:
    """Medians and quartiles of every contender that runs, in graphs and as called; the best of either side."""
    errors: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name, run in runs.items():
        try:
            errors[name] = float((run()[:1] - exact).norm() / exact.norm())
        except RuntimeError as error:
            problems[name] = str(error).partition("\n")[0]
    runs = {name: runs[name] for name in errors}
    found: dict[str, Any] = {"error": errors, "problems": problems}
    graphs = {name: captured(run) for name, run in runs.items()}
    for kind, contenders in (("graph", graphs), ("call", runs)):
        times = {name: [one / depth for one in taken] for name, taken in filled_turns(contenders, rounds).items()}
        found[f"{kind}_ms"] = {name: statistics.median(taken) for name, taken in times.items()}
        found[f"{kind}_quartiles_ms"] = {name: statistics.quantiles(taken, n=4)[::2] for name, taken in times.items()}
    medians = found["graph_ms"]
    theirs = min((name for name in medians if name.startswith("cudnn")), key=medians.__getitem__)
    ours = min((name for name in medians if not name.startswith("cudnn")), key=medians.__getitem__, default=None)
    ratio = None if ours is None else medians[theirs] / medians[ours]
    return {**found, "best_cudnn": theirs, "best": ours, "times_faster": ratio}


def captured(run: Run) -> Run:
    """A replay of the CUDA graph of `run`, which has chosen and compiled its kernels before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def filled_turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one run each, from as many behind each other as fill `_FILL_MS`, in turns."""

    def repeated(run: Run, count: int) -> None:
        for _ in range(count):
            run()

    counts: dict[str, int] = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        counts[name] = max(1, math.ceil(_FILL_MS / max(timed(run), 1e-3)))
    timers = {name: partial(timed, partial(repeated, run, counts[name])) for name, run in runs.items()}
    called_in_turns(timers, 1)
    return {name: [one / counts[name] for one in taken] for name, taken in called_in_turns(timers, rounds).items()}


if __name__ == "__main__":
    main()
