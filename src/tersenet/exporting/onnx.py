"""A network as an ONNX file, for ONNX Runtime, OpenVINO, TensorRT and others."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from tersenet import atomic
from tersenet.errors import GraphError, TersenetError
from tersenet.exporting.program import batches, exported, first_line
from tersenet.graph.trace import evaluating
from tersenet.measuring.meta import tensors_in

_TOLERANCE = 1e-4
# One protobuf message, as which a file without side files is written, holds no more.
_MOST_BYTES = 2**31 - 1


def export_onnx(model: nn.Module, path: Path | str, example: tuple[Any, ...]) -> Path:
    """Write `model` to `path` (.onnx), for any batch size. Where ONNX Runtime is installed, it has run the file with
    outputs that differ from the network's by at most 1e-4 of their largest value.

    Args:
        example: the inputs of one forward pass; the first axis of every tensor is the batch.

    Raises:
        TersenetError: another file ending, the extra `onnx` is not installed, a full disk.
        GraphError: the network can't be exported, or the file's outputs would differ from the network's.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise TersenetError(f"export to {path.name!r}: the file must end in .onnx")
    for package in ("onnx", "onnxscript"):
        if not _installed(package):
            raise TersenetError(
                f"export to {path.name!r} needs {package}, which is not installed: pip install 'tersenet[onnx]'"
            )
    inputs = batches(example)
    data = _converted(type(model).__name__, exported(model, inputs))
    if _installed("onnxruntime"):
        for size, batch in inputs.items():
            _check_equal(model, data, batch, size)
    atomic.write_bytes(path, data)
    return path


def _converted(name: str, program: ExportedProgram) -> bytes:
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if weights > _MOST_BYTES:
        raise TersenetError(f"{name} has {weights:,} bytes of weights; an ONNX file holds at most {_MOST_BYTES:,}")
    try:
        # The converter and its passes print progress and hints for their own developers.
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            made = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:
        raise GraphError(f"{name} can't be converted to ONNX: {type(error).__name__}: {first_line(error)}") from error
    assert made is not None  # only the converter that writes a file itself returns nothing
    return made.model_proto.SerializeToString()


def _check_equal(model: nn.Module, data: bytes, batch: tuple[Any, ...], size: int) -> None:
    runtime = importlib.import_module("onnxruntime")
    name = type(model).__name__
    with torch.no_grad(), evaluating(model):
        wanted = tensors_in(model(*batch))
    try:
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        feed = dict(zip(names, (x.cpu().numpy() for x in tensors_in(batch)), strict=True))
        found = session.run(None, feed)
    except Exception as error:
        raise GraphError(f"ONNX Runtime can't run {name} at batch size {size}: {first_line(error)}") from error
    for output, reference in zip(found, wanted, strict=True):
        _compare(name, output, reference.cpu().numpy(), size)


def _compare(name: str, found: Any, wanted: Any, size: int) -> None:
    difference = np.abs(found - wanted).max(initial=0)
    largest = np.abs(wanted).max(initial=0)
    if found.shape != wanted.shape or not difference <= _TOLERANCE * largest:
        raise GraphError(
            f"{name} was converted to ONNX, but ONNX Runtime's outputs differ at batch size {size} by {difference:.2g} "
            f"where the largest is {largest:.2g}. Nothing was written; export to .pt2 instead"
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
