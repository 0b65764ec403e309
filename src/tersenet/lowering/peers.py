"""The runtimes that a lowered network is compared with, each as fast as its settings make it, all in float32 or,
with `half`, in bfloat16."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.exporting.onnx import export_onnx
from tersenet.graph.copies import copied
from tersenet.graph.passes import tensors_in
from tersenet.lowering.assign import channels_last

Runner = Callable[[], list[Tensor]]
Maker = Callable[[nn.Module, tuple[Tensor, ...], int, Path, bool], Runner]
"""Makes a runner of a network, its inputs, a number of threads, a folder for files, and whether it
is to compute in bfloat16.

Raises: any exception of the runtime that can't run it.
"""


def _ordered(model: nn.Module, inputs: tuple[Tensor, ...], half: bool) -> tuple[Any, tuple[Tensor, ...]]:
    """A copy of the network, and its inputs, in channels-last memory and in the type to compute in."""
    network = copied(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    ordered = tuple(map(channels_last, inputs))
    if not half:
        return network, ordered
    return network.bfloat16(), tuple(x.bfloat16() if x.is_floating_point() else x for x in ordered)


def _eager(model: nn.Module, inputs: tuple[Tensor, ...], threads: int, folder: Path, half: bool) -> Runner:
    network, ordered = _ordered(model, inputs, half)
    return lambda: tensors_in(network(*ordered))


def _compiled(model: nn.Module, inputs: tuple[Tensor, ...], threads: int, folder: Path, half: bool) -> Runner:
    network, ordered = _ordered(model, inputs, half)
    network: Any = torch.compile(network, options={"freezing": True})

    def run() -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return tensors_in(network(*ordered))

    return run


def _onnx_file(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> Path:
    path = folder / "network.onnx"
    if not path.exists():
        with torch.inference_mode(False):
            export_onnx(model, path, tuple(x.clone() for x in inputs))
    return path


def _onnxruntime(model: nn.Module, inputs: tuple[Tensor, ...], threads: int, folder: Path, half: bool) -> Runner:
    if half:
        raise RuntimeError("it has no bfloat16 kernels for the CPU")
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    path = str(_onnx_file(model, inputs, folder))
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {entry.name: np.ascontiguousarray(x.numpy()) for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: [torch.from_numpy(y) for y in session.run(None, feed)]


def _openvino(model: nn.Module, inputs: tuple[Tensor, ...], threads: int, folder: Path, half: bool) -> Runner:
    openvino = importlib.import_module("openvino")
    core = openvino.Core()
    read = core.read_model(str(_onnx_file(model, inputs, folder)))
    read.reshape({port: list(x.shape) for port, x in zip(read.inputs, inputs, strict=True)})
    # Its default precision is bfloat16 where the processor has it.
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(read, "CPU", settings).create_infer_request()
    arrays = [np.ascontiguousarray(x.numpy()) for x in inputs]

    def run() -> list[Tensor]:
        request.infer(arrays, share_inputs=True)
        return [torch.from_numpy(np.array(output.data)) for output in request.output_tensors]

    return run


def _ncnn(model: nn.Module, inputs: tuple[Tensor, ...], threads: int, folder: Path, half: bool) -> Runner:
    """ncnn takes one sample at a time."""
    ncnn, pnnx = importlib.import_module("ncnn"), importlib.import_module("pnnx")
    path = folder / "network.pt"
    one = tuple(x[:1] for x in inputs)
    with torch.inference_mode(False), torch.no_grad():
        torch.jit.trace(model, tuple(x.clone() for x in one)).save(str(path))  # pyright: ignore
    shapes = ",".join(str(list(x.shape)).replace(" ", "") for x in one)
    _quietly([pnnx.EXEC_PATH, str(path), f"inputshape={shapes}", "fp16=0"], folder)
    net = ncnn.Net()
    net.opt.num_threads = threads
    for name in dir(net.opt):
        if name.startswith(("use_fp16", "use_bf16", "use_int8")):
            setattr(net.opt, name, half and name.startswith("use_bf16"))
    if net.load_param(str(folder / "network.ncnn.param")) or net.load_model(str(folder / "network.ncnn.bin")):
        raise RuntimeError("ncnn does not know an operator of this network")
    arrays = [np.ascontiguousarray(x.numpy()) for x in inputs]

    def run() -> list[Tensor]:
        samples: list[list[Tensor]] = []
        for number in range(len(inputs[0])):
            extractor = net.create_extractor()
            for name, array in zip(net.input_names(), arrays, strict=True):
                extractor.input(name, ncnn.Mat(array[number]))
            found = (np.array(extractor.extract(name)[1]) for name in net.output_names())
            samples.append([torch.from_numpy(y) for y in found])
        return [torch.stack(outputs) for outputs in zip(*samples, strict=True)]

    return run


def _mnn(model: nn.Module, inputs: tuple[Tensor, ...], threads: int, folder: Path, half: bool) -> Runner:
    if half:
        raise RuntimeError("its reduced precision is not bfloat16 on every processor")
    source, path = _onnx_file(model, inputs, folder), folder / "network.mnn"
    # In a process of its own, since it prints. Never import MNN.tools: it installs packages.
    convert = ["mnnconvert", "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(path), "--bizCode", "bench"]
    _quietly([sys.executable, "-c", f"import MNN, _tools; _tools.mnnconvert({convert!r})"], folder)
    runtime, expr = importlib.import_module("MNN.nn"), importlib.import_module("MNN.expr")
    settings = {"backend": "CPU", "precision": "high", "memory": "high", "power": "high", "numThread": threads}
    manager = runtime.create_runtime_manager((settings,))
    session = importlib.import_module("onnxruntime").InferenceSession(str(source), providers=["CPUExecutionProvider"])
    names = [[entry.name for entry in entries] for entries in (session.get_inputs(), session.get_outputs())]
    net = runtime.load_module_from_file(str(path), *names, runtime_manager=manager)
    arrays = [np.ascontiguousarray(x.numpy()) for x in inputs]

    def run() -> list[Tensor]:
        given = [expr.placeholder(list(array.shape), expr.NCHW) for array in arrays]
        for place, array in zip(given, arrays, strict=True):
            place.write(array)
        outputs = net.forward(given)
        outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        return [torch.from_numpy(np.array(expr.convert(y, expr.NCHW).read())) for y in outputs]

    return run


def _quietly(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().rpartition("\n")[2] or f"{command[0]} failed")


PEERS: dict[str, Maker] = {
    "eager": _eager,
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "ncnn": _ncnn,
    "mnn": _mnn,
}
