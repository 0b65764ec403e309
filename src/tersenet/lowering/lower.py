"""From a trained network to one that runs as fast as this machine can run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from tersenet.errors import GraphError, TersenetError, UnknownNameError
from tersenet.graph.model import random_like
from tersenet.graph.precision import full_float32
from tersenet.graph.record import input_of
from tersenet.graph.trace import evaluating, tensors_in
from tersenet.lowering.assign import channels_last, chosen, distance, kernels_offered, run_graph, sizes_of
from tersenet.lowering.fold import fold_affine
from tersenet.lowering.fuse import fuse
from tersenet.lowering.layers import CHOICES
from tersenet.lowering.modules import TorchConvolution, TorchDomain
from tersenet.lowering.program import program
from tersenet.lowering.report import LoweredReport
from tersenet.models.usable import unwrapped

_ERROR = 1e-3
_HALF_ERROR = 5e-2


class Lowered(nn.Module):
    """A network for inference on this machine: call it like the original, with any batch size. `report` says what was
    done. It has no gradients, and neither moves to another device nor saves: save the original and lower it again."""

    def __init__(self, graph: fx.GraphModule, inputs: tuple[Tensor, ...], report: LoweredReport) -> None:
        super().__init__()
        self.graph = graph
        self.report = report
        self._inputs = tuple((tuple(x.shape[1:]), x.dtype) for x in inputs)
        super().train(False)

    def forward(self, *inputs: Tensor) -> Any:
        """Raises: TersenetError for inputs of another size, kind or device than the example's."""
        if len(inputs) != len(self._inputs):
            raise TersenetError(f"this lowered network takes {len(self._inputs)} inputs, not {len(inputs)}")
        for number, (x, (shape, dtype)) in enumerate(zip(inputs, self._inputs, strict=True)):
            if x.shape[1:] != shape or x.dtype != dtype or x.device.type != "cpu":
                raise TersenetError(
                    f"input {number} (={x.dtype} {tuple(x.shape)} on {x.device}) must be {dtype} of shape "
                    f"{('N', *shape)} on the CPU, for which the network was lowered: lower it again for this one"
                )
        with torch.no_grad():
            return self.graph(*map(channels_last, inputs))

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode. Raises: TersenetError if training is asked for."""
        if mode:
            raise TersenetError("a lowered network can't be trained: train the original and lower it again")
        return self


def lower(
    model: nn.Module,
    example: Any,
    *,
    half: bool = False,
    choice: str | None = None,
    threads: int | None = None,
    tolerance: float | None = None,
) -> Lowered:
    """A copy of `model` for inference on this machine's CPU. The model is not changed.

    Batch norms are folded, sums and activations fused into convolutions, weights packed, memory is channels-last, and
    each convolution runs on the kernel that was fastest when it was measured here. Times are kept in the user's cache
    folder.

    Args:
        model: float32, on the CPU; torch.export has to take it.
        example: what forward takes: a tensor (N, ...) or a tuple of them. Its batch is what is measured with; any
            batch size runs. Other sizes are fixed.
        half: also try weights kept in 16 bits; they are less exact.
        choice: `torch`, `direct`, `F2`, `F4`, `F6`, `F2 half`, `F4 half`, `sparse` or `scattered` for every layer that
            it fits, unmeasured; for the others `direct`, and `torch` where that does not fit. None: measure.
        threads: how many to measure with; by default torch's current number. The result runs on torch's number.
        tolerance: largest relative L2 error of an output; by default 1e-3, with 16-bit weights 5e-2.

    Raises:
        TersenetError: another type or device, an unknown choice, threads below 1.
        GraphError: the network can't be exported, or the lowered one's outputs differ by more than `tolerance`.
    """
    model = unwrapped(model)
    inputs: tuple[Tensor, ...] = tuple(example) if isinstance(example, (tuple, list)) else (example,)  # pyright: ignore
    input_of(inputs)
    _check(model, inputs, choice, threads)
    uses_half = half or (choice or "").endswith("half")
    limit = tolerance if tolerance is not None else _HALF_ERROR if uses_half else _ERROR
    notes: list[str] = []
    with _threads(threads), full_float32(), torch.no_grad():
        made = program(model, inputs)
        folded = fold_affine(made)
        layers = fuse(made)
        graph = _owned(made)
        noise = random_like(inputs, seed=0)
        sizes = sizes_of(graph, layers, noise)
        offered = kernels_offered(half, choice, notes, layers.values())
        found = chosen(graph, layers, sizes, offered, noise, choice)
        other = Counter(_operator(node) for node in graph.graph.nodes if node.op == "call_function")
        for name in ("sym_size", "getitem"):
            other.pop(name, None)
        batch, used = len(inputs[0]), torch.get_num_threads()
        error = 0.0
        for size in (batch, batch + 1):
            again = tuple(x if len(x) == size else torch.cat([x, x[:1]]) for x in noise)
            error = max(error, _compare(model, graph, again, size, limit))
    return Lowered(graph, inputs, LoweredReport(found, error, folded, dict(other), batch, used, tuple(notes)))


def _check(model: nn.Module, inputs: tuple[Tensor, ...], choice: str | None, threads: int | None) -> None:
    if choice is not None and choice not in CHOICES:
        raise UnknownNameError("choice", choice, CHOICES, f"Known: {', '.join(CHOICES)}")
    if threads is not None and threads < 1:
        raise TersenetError(f"threads (={threads}) must be at least 1")
    held = [*model.named_parameters(), *model.named_buffers()]
    inputs_held = [(f"input {number} of the example", x) for number, x in enumerate(inputs)]
    for name, tensor in [*held, *inputs_held]:
        if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise TersenetError(
                f"{name} is {tensor.dtype} on {tensor.device}; networks are lowered for float32 on the CPU: "
                "move the network and its example there with .cpu().float()"
            )


@contextmanager
def _threads(count: int | None) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _owned(made: fx.GraphModule) -> fx.GraphModule:
    """A module of the graph alone, whose tensors are nobody else's."""
    made.graph.eliminate_dead_code()
    graph = fx.GraphModule(made, made.graph)
    for module in graph.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
        if not isinstance(module, (TorchConvolution, TorchDomain)):
            for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                setattr(module, name, channels_last(buffer.detach().clone()))
    return graph


def _operator(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema is not None else getattr(node.target, "__name__", str(node.target))


def _compare(model: nn.Module, graph: fx.GraphModule, inputs: tuple[Tensor, ...], batch: int, limit: float) -> float:
    """The largest distance of an output. Raises: GraphError if it is above `limit`."""
    with evaluating(model):
        expected = tensors_in(run_graph(model, tuple(x.clone() for x in inputs)))
    outputs = tensors_in(run_graph(graph, inputs))
    pairs = list(zip(outputs, expected, strict=True))
    error = max((distance(a, b) if a.shape == b.shape else float("inf") for a, b in pairs), default=0.0)
    if not error <= limit:
        raise GraphError(
            f"the lowered {type(model).__name__} differs from the network by {error:.1e} (relative L2 distance at "
            f"batch size {batch}), more than the tolerance of {limit:.0e}. Try choice='F2' or 'direct', without half"
        )
    return error
