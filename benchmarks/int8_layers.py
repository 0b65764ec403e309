"""Quantized 3x3 layers and ResNet-18 in 8-bit integers, beside ONNX Runtime and OpenVINO in the same precision.

    python -m benchmarks.int8_layers --threads 1 2

A row of `layers` is three equal convolutions with ReLU behind each other, each with a weight of its own; times are a
third of that. `direct`, `F2` and `F4` are ours: the direct convolution, and Winograd's with everything in 8 bits and
one scale for each tap. The peers run the direct convolution, quantized by ONNX Runtime's own tool (QDQ, one scale for
each filter, unsigned activations), the form that both are made for; OpenVINO's floating point is pinned to float32.
`vnni` is our best without AMX's tiles. `error` is the relative L2 distance from the same layers in floating point.

A row of `networks` is ResNet-18, 224 x 224: all convolutions but its stem quantized, 3x3 ones of stride 1 directly or
by F2 or F4, calibrated on noise and lowered; the peers run the direct one as above, which quantizes sums too, and
`onnxruntime F2`, `F4` are the Winograd networks as `tersenet export` writes them. Weights are random: this is about
time. float32 is the lowered network as it was.

Contenders run in turns, passes for 0.2 seconds before each timed one. On one thread processor time counts, else wall
time. Nothing else should run meanwhile. Writes int8_layers.json beside this file after each row; a row that is in it,
from the same environment, is not measured again. Five minutes for each number of threads.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tersenet as tn
from tersenet import api
from tersenet.environment import environment, installed
from tersenet.exporting.onnx import export_onnx
from tersenet.graph.copies import copied
from tersenet.graph.edits import Quantize, Winograd
from tersenet.kernels.int8 import int8_isa, usable_isas
from tersenet.lowering.assign import channels_last, distance
from tersenet.measuring.turns import warm_in_turns
from tersenet.nn.winograd import calibration
from tersenet.nn.winograd_settings import Quantization, Quantizer, WinogradSettings

RESULT = Path(__file__).with_suffix(".json")
DEPTH = 3
TILES = {"direct": 0, "F2": 2, "F4": 4}
SHAPES = tuple((images, *shape) for images in (1, 8) for shape in ((64, 56), (128, 28), (256, 14), (512, 7)))
Run = Callable[[], Any]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9, help="for each row")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    packages = {name: installed(name) for name in ("llvmlite", "onnxruntime", "openvino")}
    where = {**environment("cpu"), **packages, "threads": max(options.threads)}
    result: dict[str, Any] = {
        "claim": "time of quantized layers, and of a network of them, in 8-bit integers",
        "command": " ".join(["python -m benchmarks.int8_layers", *sys.argv[1:]]),
        "environment": where,
        "layers": [],
        "networks": [],
    }
    if options.result.exists():
        before = json.loads(options.result.read_text())
        if before["environment"] == where:
            result |= {kind: before[kind] for kind in ("layers", "networks")}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for images, channels, side in SHAPES:
            key = {"threads": threads, "images": images, "channels": channels, "side": side}
            add(result, "layers", key, lambda key=key: layers(**key, rounds=options.rounds), options.result)
        for images in (1, 8):
            key = {"threads": threads, "images": images}
            add(result, "networks", key, lambda key=key: network(**key, rounds=options.rounds), options.result)


def add(result: dict[str, Any], kind: str, key: Row, measure: Callable[[], Row], path: Path) -> None:
    """The row of `key`, unless it is there already."""
    if any(key.items() <= row.items() for row in result[kind]):
        return
    row = key | measure()
    result[kind].append(row)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(kind, json.dumps(row), flush=True)


def layers(threads: int, images: int, channels: int, side: int, rounds: int) -> Row:
    """Three layers, by all contenders."""
    torch.manual_seed(0)
    size = (images, channels, side, side)
    plain = nn.Sequential()
    for _ in range(DEPTH):
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.normal_(conv.weight, std=math.sqrt(2 / 9 / channels))
        plain.extend([conv, nn.ReLU()])
    x = torch.randn(size)
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, tile in TILES.items():
            runs[name] = lowered(quantized(plain, tile, size, stem=False), x)
            with on_vectors() as usable:
                if usable:
                    runs[f"{name} vnni"] = lowered(quantized(plain, tile, size, stem=False), x)
        peers(runs, plain, x, threads, Path(folder))
        return timed(runs, x, plain, rounds, DEPTH)


def network(threads: int, images: int, rounds: int) -> Row:
    """ResNet-18, by all contenders."""
    torch.manual_seed(0)
    plain, _ = api.open_example("resnet18", batch=images)
    plain = plain.eval()
    x = torch.randn(images, 3, 224, 224)
    runs: dict[str, Run] = {"float32": lowered(plain, x, None)}
    with tempfile.TemporaryDirectory() as folder:
        for name, tile in TILES.items():
            made = quantized(plain, tile, (4, *x.shape[1:]), stem=True)
            runs[name] = lowered(made, x, None)
            if tile:
                path = Path(folder) / f"{name}.onnx"
                with suppress(Exception):  # it has not been tried with every version of the converter
                    runs[f"onnxruntime {name}"] = onnxruntime(export_onnx(made, path, (x,)), x, threads)
        peers(runs, plain, x, threads, Path(folder))
        return timed(runs, x, plain, rounds, 1)


def quantized(plain: nn.Module, tile: int, size: tuple[int, ...], stem: bool) -> nn.Module:
    """A copy in 8 bits, calibrated on noise; a `stem` stays as it is. Direct convolutions have one scale per filter."""
    net = copied(plain).eval()
    eight = Quantizer(bits=8)
    direct = Quantization(input=eight, weight=Quantizer(bits=8, per="channel"))
    named = [(name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    for name, conv in named[1 if stem else 0 :]:
        if tile and conv.kernel_size == (3, 3) and conv.stride == (1, 1):
            settings = WinogradSettings(tile=tile, quantization=Quantization.tapwise(8))
            Winograd(module=name, settings=settings).replay(net)
        else:
            Quantize(module=name, quantization=direct).replay(net)
    with torch.no_grad(), calibration(net):
        net(torch.randn(size))
    return net


def lowered(net: nn.Module, x: Tensor, choice: str | None = "int8") -> Run:
    """What `tersenet lower` makes of it."""
    fast = tn.lower(net, x, choice=choice)
    ordered = channels_last(x)
    return lambda: fast(ordered)


class on_vectors:
    """Inside, as if the processor had no tiles; whether it can do without them, and has them."""

    def __enter__(self) -> bool:
        self._before = usable_isas
        others = [isa for isa in usable_isas() if "amx-tile" not in isa.needs]
        if others and others[0] is not int8_isa():
            module: Any = importlib.import_module("tersenet.kernels.int8")
            module.usable_isas = lambda: tuple(others)
            return True
        return False

    def __exit__(self, *error: object) -> None:
        module: Any = importlib.import_module("tersenet.kernels.int8")
        module.usable_isas = self._before


def peers(runs: dict[str, Run], plain: nn.Module, x: Tensor, threads: int, folder: Path) -> None:
    """The direct convolutions, quantized by ONNX Runtime's tool, in the runtimes that are installed."""
    path = folder / "static.onnx"
    tool = importlib.import_module("onnxruntime.quantization")

    class Reader(tool.CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self._rest: Iterator[Mapping[str, Any]] = iter([{name: x.numpy()}])

        def get_next(self) -> Any:
            return next(self._rest, None)

    export_onnx(plain, folder / "plain.onnx", (x,))
    name = importlib.import_module("onnx").load(folder / "plain.onnx").graph.input[0].name
    tool.quantize_static(
        folder / "plain.onnx", path, Reader(name), tool.QuantFormat.QDQ, per_channel=True,
        activation_type=tool.QuantType.QUInt8, weight_type=tool.QuantType.QInt8,
        nodes_to_exclude=stem_of(folder / "plain.onnx") if x.shape[1] == 3 else [],
    )  # fmt: skip
    runs["onnxruntime"] = onnxruntime(path, x, threads)
    with suppress(ImportError):
        runs["openvino"] = openvino(path, x, threads)


def stem_of(path: Path) -> list[str]:
    """The first convolution and the linear layer, which ours leave in floating point too."""
    nodes = importlib.import_module("onnx").load(path).graph.node
    kinds = {kind: [node.name for node in nodes if node.op_type == kind] for kind in ("Conv", "Gemm", "MatMul")}
    return [*kinds["Conv"][:1], *kinds["Gemm"], *kinds["MatMul"]]


def onnxruntime(path: Path, x: Tensor, threads: int) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: np.ascontiguousarray(x.numpy())}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(path: Path, x: Tensor, threads: int) -> Run:
    core = importlib.import_module("openvino").Core()
    read = core.read_model(str(path))
    read.reshape({read.inputs[0]: list(x.shape)})
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = core.compile_model(read, "CPU", settings).create_infer_request()
    array = np.ascontiguousarray(x.numpy())

    def run() -> Tensor:
        request.infer([array], share_inputs=True)
        return torch.from_numpy(np.array(request.output_tensors[0].data))

    return run


def timed(runs: dict[str, Run], x: Tensor, plain: nn.Module, rounds: int, depth: int) -> Row:
    """Medians and quartiles, and how many times longer the best peer takes than each of ours."""
    clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    with torch.inference_mode():
        exact = plain(x)
        errors = {name: distance(run(), exact) for name, run in runs.items()}
        found = {name: [t / depth for t in taken] for name, taken in warm_in_turns(runs, rounds, clock).items()}
    times = {name: statistics.median(taken) for name, taken in found.items()}
    best = min(times[name] for name in ("onnxruntime", "openvino") if name in times)
    return {
        "rounds": rounds,
        "median_ms": times,
        "quartiles_ms": {name: statistics.quantiles(taken, n=4)[::2] for name, taken in found.items()},
        "times_faster_than_best_peer": {name: best / times[name] for name in itertools.chain(TILES) if name in times},
        "error": errors,
    }


if __name__ == "__main__":
    main()
