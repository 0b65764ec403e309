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
from torch import Tensor, nn
from torch.export import ExportedProgram

from tersenet import atomic
from tersenet.errors import GraphError, TersenetError, first_line
from tersenet.exporting.deploy import Quantized, deployed
from tersenet.exporting.program import batches, exported
from tersenet.exporting.qdq import finish, is_quantized, opset, translations
from tersenet.graph.trace import evaluating
from tersenet.measuring.meta import tensors_in
from tersenet.nn.levels import as_operators

_TOLERANCE = 1e-4
# Of the l2 norm, for quantized networks: another order of summation moves single values by a whole level, and layers
# behind them many more. How far that goes is found out with inputs that are changed in their last digits.
_QUANTIZED_TOLERANCE = 0.05
_LAST_DIGITS, _TIMES = 1e-6, 4
# One protobuf message, as which a file without side files is written, holds no more.
_MOST_BYTES = 2**31 - 1


def export_onnx(model: nn.Module, path: Path | str, example: tuple[Any, ...], quantized: Quantized = "folded") -> Path:
    """Write `model` to `path` (.onnx), for any batch size. Where ONNX Runtime is installed, it has run the file with
    outputs that differ from the network's by at most 1e-4 of their largest value; those of a quantized network, in
    the l2 norm, by at most 5 % or four times what a change of the inputs by a millionth does to the network itself:
    runtimes sum in another order, which moves single values by a level.

    Args:
        example: the inputs of one forward pass; the first axis of every tensor is the batch.
        quantized: what becomes of Winograd and quantized layers. `folded`: QuantizeLinear and DequantizeLinear, with
            the transformed weights as integers and the Winograd layers described in the file's metadata; in floating
            point, plain convolutions where transforms are exact. `plain`: ordinary convolutions, without any rounding.

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
    model = deployed(model, quantized)
    with as_operators():
        program = exported(model, inputs)
    data = _converted(model, program)
    if _installed("onnxruntime"):
        for size, batch in inputs.items():
            _check_equal(model, data, batch, size)
    atomic.write_bytes(path, data)
    return path


def _converted(model: nn.Module, program: ExportedProgram) -> bytes:
    name = type(model).__name__
    weights = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    if weights > _MOST_BYTES:
        raise TersenetError(f"{name} has {weights:,} bytes of weights; an ONNX file holds at most {_MOST_BYTES:,}")
    try:
        # The converter and its passes print progress and hints for their own developers.
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            known: Any = translations(model) if is_quantized(model) else None
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, custom_translation_table=known, opset_version=opset(model)
            )
    except Exception as error:
        raise GraphError(f"{name} can't be converted to ONNX: {type(error).__name__}: {first_line(error)}") from error
    assert made is not None  # only the converter that writes a file itself returns nothing
    proto = made.model_proto
    finish(model, proto)
    return proto.SerializeToString()


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
        reference = reference.cpu().numpy()
        difference = np.abs(output - reference).max(initial=0) if output.shape == reference.shape else np.inf
        largest = np.abs(reference).max(initial=0)
        if not difference <= _TOLERANCE * largest and not _as_near_as_itself(model, batch, found, wanted):
            raise GraphError(
                f"{name} was converted to ONNX, but ONNX Runtime's outputs differ at batch size {size} by "
                f"{difference:.2g} where the largest is {largest:.2g}. Nothing was written; export to .pt2 instead"
            )


def _as_near_as_itself(model: nn.Module, batch: tuple[Any, ...], found: list[Any], wanted: list[Tensor]) -> bool:
    """Whether a quantized network's outputs differ no more than its own do for inputs changed in their last digits."""
    if not is_quantized(model):
        return False
    near = tuple(x * (1 + _LAST_DIGITS) if isinstance(x, Tensor) and x.is_floating_point() else x for x in batch)
    with torch.no_grad(), evaluating(model):
        moved = tensors_in(model(*near))
    # In float64: integers, such as classes, have no norm.
    for output, reference, other in zip(found, (x.double() for x in wanted), (x.double() for x in moved), strict=True):
        allowed = max(_QUANTIZED_TOLERANCE * float(reference.norm()), _TIMES * float((other - reference).norm()))
        if output.shape != reference.shape or not np.linalg.norm(output - reference.cpu().numpy()) <= allowed:
            return False
    return True


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
