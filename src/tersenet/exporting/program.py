"""A network as a torch ExportedProgram, which runs where tersenet is not installed."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tersenet import atomic
from tersenet.errors import GraphError, TersenetError, first_line
from tersenet.exporting.deploy import Quantized, deployed
from tersenet.graph.trace import evaluating


def export_program(
    model: nn.Module, path: Path | str, example: tuple[Any, ...], quantized: Quantized = "folded"
) -> Path:
    """Write `model` to `path` (.pt2), for any batch size; load it with `torch.export.load(path).module()`.

    Args:
        example: the inputs of one forward pass; the first axis of every tensor is the batch.
        quantized: see `export_onnx`; here rounding is spelled out in torch's operators.

    Raises:
        TersenetError: another file ending, a full disk.
        GraphError: the network can't be exported, or the program's outputs would differ from the network's.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise TersenetError(f"export to {path.name!r}: the file must end in .pt2 (a torch ExportedProgram) or .onnx")
    program = exported(deployed(model, quantized), batches(example))
    # By way of memory, since torch reports a full disk as an error of its own kind.
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    atomic.write_bytes(path, buffer.getvalue())
    return path


def batches(example: tuple[Any, ...]) -> dict[int, tuple[Any, ...]]:
    """`example` as a batch of 2 and as one of 3: torch.export takes a size of 1 for a constant, and what it made would
    then serve single images only."""
    return {size: tuple(_batch(x, size) for x in example) for size in (2, 3)}


def exported(model: nn.Module, inputs: dict[int, tuple[Any, ...]]) -> ExportedProgram:
    """The program of `model` in evaluation mode, for any batch size.

    Raises:
        GraphError: the network can't be exported, or the program's outputs would differ from the network's.
    """
    shapes = any_batch(model, inputs[2])
    with evaluating(model), torch.no_grad():
        try:
            program = torch.export.export(model, inputs[2], dynamic_shapes=shapes, strict=False)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise GraphError(f"{type(model).__name__} can't be exported: {reason}") from error
        for size, batch in inputs.items():
            _check_equal(model, program, batch, size)
    return program


def any_batch(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """torch.export's `dynamic_shapes` for a free first axis of every tensor, in the structure of forward's signature:
    those of `*images` are one tuple."""
    axes = tuple({0: torch.export.Dim.AUTO} if isinstance(x, Tensor) and x.dim() else None for x in inputs)
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return axes
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*axes[:named], axes[named:])


def _batch(value: Any, size: int) -> Any:
    """The first samples of `value`, repeated if it has fewer than `size`."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    return value.repeat(-(-size // max(len(value), 1)), *[1] * (value.dim() - 1))[:size]


def _check_equal(model: nn.Module, program: ExportedProgram, inputs: tuple[Any, ...], size: int) -> None:
    try:
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} was exported, but the program differs from it at batch size {size}: "
            f"{first_line(error)}. Nothing was written; forward must treat the samples of a batch alike"
        ) from error
