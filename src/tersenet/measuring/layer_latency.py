"""What a convolution costs on this machine by each way of computing it: the table that layers are chosen by.

A table is a JSON file: where it was measured, and one row for each layer shape, tile and number of bits. A table of
another machine, such as a phone's, can be written by hand or by a program, and is used in the same way.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from tersenet import atomic
from tersenet.environment import environment, installed, processor
from tersenet.errors import TersenetError

Tile = Literal["direct"] | int


class Shape(BaseModel):
    """A convolution and the map that it makes, per image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: int = Field(ge=1)
    out_channels: int = Field(ge=1)
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = Field(ge=1)
    map: tuple[int, int]
    """Height and width of the output."""

    @classmethod
    def of(cls, conv: nn.Conv2d, outputs: Sequence[int]) -> Shape:
        kernel, stride, dilation = ((v[0], v[1]) for v in (conv.kernel_size, conv.stride, conv.dilation))
        return cls(
            in_channels=conv.in_channels,
            out_channels=conv.out_channels,
            kernel=kernel,
            stride=stride,
            dilation=dilation,
            groups=conv.groups,
            map=(outputs[2], outputs[3]),
        )


class Row(BaseModel):
    """One way of computing a layer. `kernel` says what was timed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: Shape
    tile: Tile
    bits: int | None
    ms: float = Field(gt=0, allow_inf_nan=False)
    kernel: str = ""


class LatencyTable(BaseModel):
    """Milliseconds of layers, for `batch` images at a time on `threads` threads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    environment: dict[str, Any]
    batch: int = Field(ge=1)
    threads: int = Field(ge=1)
    rows: tuple[Row, ...]

    def ms(self, shape: Shape, tile: Tile, bits: int | None) -> float:
        """Raises: TersenetError if the table has no such row."""
        for row in self.rows:
            if (row.shape, row.tile, row.bits) == (shape, tile, bits):
                return row.ms
        raise TersenetError(
            f"the latency table has no row for tile {tile} at {bits or 'floating point'} bits of {shape.kernel} "
            f"{shape.in_channels} -> {shape.out_channels} on a map of {shape.map}: measure it for this network, with "
            "`tersenet winograd latency`"
        )

    def save(self, path: Path | str) -> None:
        atomic.write_text(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> LatencyTable:
        """Raises: TersenetError for a file that is none, naming it."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TersenetError(
                f"{path} is no latency table: {reason}; `tersenet winograd latency` writes one"
            ) from None


Wanted = tuple[nn.Conv2d, Shape, Tile, int | None]


def measure_table(layers: Iterable[Wanted], batch: int = 1) -> LatencyTable:
    """Time every layer of `layers` that differs, for `batch` images, on torch's current number of threads.

    Floating point is timed with the kernels that `tersenet lower` chooses among, and 8 bits and fewer with those in
    integers that it has; where there are none, the direct convolution at 8 bits with ONNX Runtime's. What nothing here
    computes in fewer bits (16 bits, or groups of channels) costs what it does in floating point: this machine would
    compute it so. All times are kept in the cache folder, so that the same question has the same answer.
    """
    rows: dict[tuple[Shape, Tile, int | None], Row] = {}
    for conv, shape, tile, bits in layers:
        if (shape, tile, bits) not in rows:
            ms, kernel = _cached(conv, shape, tile, bits, batch)
            rows[shape, tile, bits] = Row(shape=shape, tile=tile, bits=bits, ms=ms, kernel=kernel)
    return LatencyTable(
        environment=environment("cpu"), batch=batch, threads=torch.get_num_threads(), rows=tuple(rows.values())
    )


def _cached(conv: nn.Conv2d, shape: Shape, tile: Tile, bits: int | None, batch: int) -> tuple[float, str]:
    from tersenet.kernels import cache
    from tersenet.lowering.integer_times import names

    versions = (torch.__version__, installed("tersenet"), installed("onnxruntime"), names())
    # Padding by other values than zeros takes other kernels.
    padding = conv.padding if conv.padding_mode == "zeros" else (conv.padding, conv.padding_mode)
    key = repr((processor(), versions, shape, tile, bits, batch, torch.get_num_threads(), padding)).encode()
    name = f"layer-{hashlib.sha256(key).hexdigest()[:24]}"
    kept = cache.read(name, key)
    if kept is not None:
        ms, kernel = json.loads(kept)
        return float(ms), str(kernel)
    found = _measured(conv, shape, tile, bits, batch)
    cache.write(name, key, json.dumps(found).encode())
    return found


def _measured(conv: nn.Conv2d, shape: Shape, tile: Tile, bits: int | None, batch: int) -> tuple[float, str]:
    if bits is not None and bits <= 8:
        from tersenet.lowering.integer_times import in_integers

        ms = in_integers(conv, (batch, conv.in_channels, *_input_size(conv, shape)), tile, bits)
        if ms is not None:
            return ms, f"{tile if tile == 'direct' else f'F{tile}'} int8"
    if bits == 8 and tile == "direct":
        found = _int8(conv, shape, batch)
        if found is not None:
            return found, "ONNX Runtime int8"
    from tersenet.lowering.choose import compiled, times_of
    from tersenet.lowering.layers import Layer

    size = (batch, conv.in_channels, *_input_size(conv, shape))
    if not isinstance(conv.padding, str) and conv.padding_mode == "zeros":
        padding = (int(conv.padding[0]), int(conv.padding[1]))
        weight = conv.weight.detach().cpu().float()
        layer = Layer("", weight, None, shape.stride, padding, shape.dilation, shape.groups, False, "none")
        if tile == "direct":
            times = times_of(layer, size, ("torch", "direct"))
            best = min(times, key=times.__getitem__)
            return times[best], f"{best} float"
        choice = f"F{tile}"
        if layer.fits(choice) and compiled([(layer, choice)]) is None:
            return times_of(layer, size, (choice,))[choice], f"{choice} float"
    own = copy.deepcopy(conv).cpu().float()
    return _median(own if tile == "direct" else _winograd(own, int(tile)), torch.zeros(size)), "torch float"


def _winograd(conv: nn.Conv2d, tile: int) -> nn.Module:
    from tersenet.nn.winograd import WinogradConv2d
    from tersenet.nn.winograd_settings import WinogradSettings

    return WinogradConv2d.from_conv(conv, WinogradSettings(tile=tile))


def _input_size(conv: nn.Conv2d, shape: Shape) -> tuple[int, int]:
    """A map that the layer makes `shape.map` of."""
    rows, columns = (
        (size - 1) * s + d * (k - 1) + 1
        for size, s, d, k in zip(shape.map, shape.stride, shape.dilation, shape.kernel, strict=True)
    )
    if isinstance(conv.padding, str):
        return shape.map if conv.padding == "same" else (rows, columns)
    return max(1, rows - 2 * int(conv.padding[0])), max(1, columns - 2 * int(conv.padding[1]))


def _pads(conv: nn.Conv2d) -> list[int]:
    """Zeros above, left of, below and right of the map, as ONNX has them."""
    if not isinstance(conv.padding, str):
        return [int(conv.padding[0]), int(conv.padding[1])] * 2
    if conv.padding == "valid":
        return [0] * 4
    around = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return [*(size // 2 for size in around), *(size - size // 2 for size in around)]


def _clock() -> int:
    """Nanoseconds: on one thread the processor's time, which other programs don't change."""
    return time.thread_time_ns() if torch.get_num_threads() == 1 else time.perf_counter_ns()


def _median(module: nn.Module, x: Tensor, rounds: int = 9) -> float:
    module = module.eval()
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(rounds + 2):
            began = _clock()
            module(x)
            times.append((_clock() - began) / 1e6)
    return sorted(times[2:])[rounds // 2]


def _int8(conv: nn.Conv2d, shape: Shape, batch: int, rounds: int = 15) -> float | None:
    """Median milliseconds of ONNX Runtime's QLinearConv; None where it is not installed or can't run the layer."""
    try:
        onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError:
        return None
    h, w = _input_size(conv, shape)
    size = [batch, conv.in_channels, h, w]
    kinds, helper = onnx.TensorProto, onnx.helper
    weights = torch.randint(-127, 128, conv.weight.shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    constants = [
        helper.make_tensor("scale", kinds.FLOAT, [], [0.05]),
        helper.make_tensor("zero", kinds.INT8, [], [0]),
        onnx.numpy_helper.from_array(weights.numpy(), "w"),
    ]
    names = ["x", "scale", "zero", "w", "scale", "zero", "scale", "zero"]
    node = helper.make_node(
        "QLinearConv", names, ["y"], strides=list(shape.stride), dilations=list(shape.dilation), pads=_pads(conv),
        group=shape.groups,
    )  # fmt: skip
    given = helper.make_tensor_value_info("x", kinds.INT8, size)
    made = helper.make_tensor_value_info("y", kinds.INT8, None)
    graph = helper.make_graph([node], "layer", [given], [made], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed = {"x": torch.randint(-127, 128, size, generator=torch.Generator().manual_seed(0)).to(torch.int8).numpy()}
        times: list[float] = []
        for _ in range(rounds + 2):
            began = _clock()
            session.run(None, feed)
            times.append((_clock() - began) / 1e6)
    except Exception:
        # Whatever it can't run, this machine does not run in 8 bits.
        return None
    return sorted(times[2:])[rounds // 2]
