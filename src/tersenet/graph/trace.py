"""A network as a flat list of operators, by torch.export."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from tersenet.errors import GraphError


@dataclass(frozen=True)
class Trace:
    """What `torch.export` saw. `tensors` maps placeholder names to the names of parameters and buffers.

    A tensor that two modules share has one canonical name: that of its first owner.
    """

    program: ExportedProgram
    tensors: dict[str, str]
    inputs: tuple[str, ...]

    @property
    def nodes(self) -> list[Node]:
        return list(self.program.graph.nodes)


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode inside; afterwards every module is in the mode that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def trace(model: nn.Module, example: tuple[Any, ...]) -> Trace:
    """The operators that `model(*example)` runs, in evaluation mode. The model is not changed.

    Raises:
        GraphError: the network can't be exported (data-dependent control flow, an input of a wrong shape), with the
            line of the user's code where that was seen.
    """
    try:
        with evaluating(model), torch.no_grad():
            program = torch.export.export(model, example, strict=False)
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} can't be traced{user_line(error)}: {first_line(error)}. The example input has "
            f"shape {[tuple(x.shape) for x in example if isinstance(x, Tensor)]}; check it, and take data-dependent "
            "Python branches out of forward"
        ) from error
    signature = program.graph_signature
    first_name: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        first_name.setdefault(id(tensor), name)
    canonical = {
        name: first_name.get(id(tensor), name)
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    }
    tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return Trace(
        program=program,
        tensors={node: canonical.get(name, name) for node, name in tensors.items()},
        inputs=tuple(signature.user_inputs),  # pyright: ignore[reportArgumentType]
    )


def where(node: Node) -> str:
    """`file.py:88` of the user's code that made this operator, as far as it is known."""
    place = ""
    lines = (node.meta.get("stack_trace") or "").splitlines()
    for line in lines:
        parts = line.strip().split('"')
        if line.strip().startswith("File") and len(parts) > 2 and "/torch/" not in parts[1]:
            number = parts[2].split("line")[-1].split(",")[0].strip()
            place = f"{parts[1].rsplit('/', 1)[-1]}:{number}"
    return place


def module_of(node: Node) -> str:
    """Dotted name of the innermost module whose forward made this operator; empty for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def user_line(error: BaseException) -> str:
    """` (at net.py:12)`: the innermost line outside torch and this package, if there is one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    frames = [f for f in frames if "tersenet/graph" not in f.filename]
    return f" (at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if frames else ""
