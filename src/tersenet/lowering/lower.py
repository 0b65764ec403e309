"""From a trained network to one that runs as fast as this machine can run it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from tersenet.errors import GraphError, TersenetError, UnknownNameError
from tersenet.graph.copies import copied
from tersenet.graph.example import checked, random_like
from tersenet.graph.precision import full_float32
from tersenet.lowering.assign import Assignment, channels_last, kernels_offered, sizes_of
from tersenet.lowering.fold import fold_affine
from tersenet.lowering.fuse import fuse
from tersenet.lowering.halves import has_tiles
from tersenet.lowering.integer_modules import hand_on_levels
from tersenet.lowering.integers import IntegerLayer
from tersenet.lowering.layers import AMX_HALF, CHOICES
from tersenet.lowering.modules import TorchConvolution, TorchDomain
from tersenet.lowering.parts import lower_parts, merged
from tersenet.lowering.pools import with_pools
from tersenet.lowering.program import program
from tersenet.lowering.proven import Proof, ProofFile, evidence
from tersenet.lowering.report import LoweredReport
from tersenet.lowering.segments import with_segments
from tersenet.lowering.verdict import ORDERED, compared, faster_than_lowered, in_order, passes, sensitivity
from tersenet.models.usable import unwrapped
from tersenet.nn.quantized_operator import as_operator

_FOLDABLE = frozenset(["tersenet.nn.quantized", "tersenet.nn.winograd"])
_ERROR = 1e-3
_HALF_ERROR = 5e-2
_QUANTIZED_ERROR, _TIMES = 5e-2, 4
"""Of a quantized network: or so many times what changing its inputs in their last digits does to it."""


class Lowered(nn.Module):
    """A network for inference on this machine: call it like the original, with any batch size. `report` says what was
    done. It has no gradients, and neither moves to another device nor saves: save the original and lower it again."""

    def __init__(
        self,
        graph: nn.Module,
        inputs: tuple[Tensor, ...] | None,
        report: LoweredReport,
        order: Callable[[Tensor], Tensor] = channels_last,
    ) -> None:
        """Args:
        inputs: the example, whose sizes are the only ones; None: `graph` takes whatever the network took.
        order: puts an input into the memory order that `graph` is made for.
        """
        super().__init__()
        self.graph = graph
        self.report = report
        self._inputs = None if inputs is None else tuple((tuple(x.shape[1:]), x.dtype, x.device) for x in inputs)
        self._order = order
        super().train(False)

    def forward(self, *inputs: Any) -> Any:
        """Raises: TersenetError for inputs of another size, kind or device than the example's."""
        problem = self.problem(inputs)
        if problem is not None:
            raise TersenetError(problem)
        with torch.no_grad():
            return self.graph(*inputs) if self._inputs is None else self.graph(*map(self._order, inputs))

    def problem(self, inputs: tuple[Any, ...]) -> str | None:
        """Why it does not take these inputs; None if it does."""
        if self._inputs is None:
            return None
        if len(inputs) != len(self._inputs):
            return f"this lowered network takes {len(self._inputs)} inputs, not {len(inputs)}"
        for number, (x, (shape, dtype, device)) in enumerate(zip(inputs, self._inputs, strict=True)):
            if not isinstance(x, Tensor):
                return f"input {number} of this lowered network must be a tensor, not {type(x).__name__}"
            if x.shape[1:] != shape or x.dtype != dtype or x.device != device:
                return (
                    f"input {number} (={x.dtype} {tuple(x.shape)} on {x.device}) must be {dtype} of shape "
                    f"{('N', *shape)} on {device}, for which the network was lowered: lower it again for this one"
                )
        return None

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
    """A copy of `model` for inference on this machine. The model is not changed.

    Batch norms are folded, sums and activations fused into convolutions, weights packed, memory is channels-last, and
    each convolution, and each pruned linear layer, runs on the kernel that was fastest when it was measured here, in
    the network. A network that is not faster lowered stays as it was. Times are kept in the user's cache folder. Of
    one that torch.export does not take, parts are lowered, as large as possible.

    Args:
        model: float32, on the CPU; torch.export has to take it, or modules of it with convolutions. Or on a CUDA
            device, in float32, float16 or bfloat16: then cuDNN is measured beside Triton's kernels, of which `choice`
            names `F2`, `F4`, `F6`, `F2 tf32x3`, `F4 tf32x3` or `sparse`, and `half` and `threads` mean nothing.
        example: what forward takes: a tensor (N, ...) or a tuple of them. Its batch is what is measured with; any
            batch size runs. Other sizes are fixed.
        half: also try weights kept in 16 bits, and bfloat16 products on AMX; they are less exact.
        choice: `torch`, `direct`, `gemm`, `amx`, `F2`, `F4`, `F6`, `F2 amx`, `F4 amx`, `amx half`, `F2 amx half`,
            `F2 half`, `F4 half`, `sparse`, `scattered` or `int8` for every layer that it fits, unmeasured; for the
            others `direct`, and `torch` where that does not fit. None: measure.
        threads: how many to measure with; by default torch's current number. The result runs on torch's number.
        tolerance: largest relative L2 error of an output; by default 1e-3, with 16-bit weights 5e-2.

    Raises:
        TersenetError: another type or device, an unknown choice, threads below 1.
        GraphError: no part of the network can be exported, or the lowered one's outputs differ by more than
            `tolerance`.
    """
    model = unwrapped(model)
    inputs = checked(example)
    if inputs[0].is_cuda:
        from tersenet.lowering.on_gpu import lower_on_gpu

        return lower_on_gpu(model, inputs, choice, tolerance)
    _check(model, inputs, choice, threads)
    uses_half = half or (choice or "").endswith("half")
    limit = tolerance if tolerance is not None else _HALF_ERROR if uses_half else _ERROR
    notes: list[str] = []
    with _threads(threads), full_float32(), torch.no_grad():
        try:
            with as_operator():
                made = program(_folded(model), inputs)
        except GraphError as error:
            settings = {"half": half, "choice": choice, "tolerance": tolerance}
            network, reports = lower_parts(model, inputs, partial(lower, **settings))
            if not reports:
                raise
            return Lowered(network, None, merged(reports, str(error), len(inputs[0]), torch.get_num_threads()))
        folded = fold_affine(made)
        layers = fuse(made, linears=(half or choice == AMX_HALF) and has_tiles())
        graph, noise = owned(made), random_like(inputs, seed=0)
        quantized = any(isinstance(layer, IntegerLayer) for layer in layers.values())
        shown = None if quantized else evidence(model, graph, noise)
        if choice != "torch":
            with_pools(graph)
        sizes = sizes_of(graph, layers, noise)
        offered = kernels_offered(half, choice, notes, layers.values())
        assignment = Assignment(graph, layers, sizes, offered, noise, choice)
        kept = None if shown is None else ProofFile(shown, layers, assignment.candidates)
        known = None if kept is None else kept.read(limit)
        judged = assignment.judged() if known is None else known.layers
        found = assignment.take(judged)
        hand_on_levels(graph)
        with_segments(graph)
        other = Counter(operator_name(node) for node in graph.graph.nodes if node.op == "call_function")
        for name in ("sym_size", "getitem"):
            other.pop(name, None)
        batch, used = len(inputs[0]), torch.get_num_threads()
        if tolerance is None and quantized:
            limit = max(limit, _QUANTIZED_ERROR, _TIMES * sensitivity(model, noise))
        error = known.error if known is not None else compared(model, graph, noise, limit)
        if known is None and kept is not None:
            kept.write(Proof(judged, error))
        times = passes(model, graph, found, layers, noise) if choice is None else {}
        best = faster_than_lowered(times) if times else None
        if best is not None:
            notes.append("the network itself was faster than lowered, so it stays as it was")
            report = LoweredReport((), 0.0, 0, {}, batch, used, tuple(notes), times, True)
            if best == ORDERED:
                return Lowered(in_order(model), inputs, report)
            return Lowered(copied(model).eval().requires_grad_(False), inputs, report, lambda x: x)
    report = LoweredReport(found, error, folded, dict(other), batch, used, tuple(notes), times)
    return Lowered(graph, inputs, report)


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


def _folded(model: nn.Module) -> nn.Module:
    """`model` with its quantized layers as they are deployed. Where no such class is loaded there is no such layer, and
    what folds them takes a tenth of a second to load."""
    if not _FOLDABLE & sys.modules.keys():
        return model
    from tersenet.exporting.deploy import deployed

    return deployed(model, "folded")


@contextmanager
def _threads(count: int | None) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def owned(made: fx.GraphModule) -> fx.GraphModule:
    """A module of the graph alone, whose tensors are nobody else's."""
    made.graph.eliminate_dead_code()
    graph = fx.GraphModule(made, made.graph)
    for module in graph.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
        if not isinstance(module, (TorchConvolution, TorchDomain)):  # their weights are copies
            for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                value = channels_last(buffer.detach())
                setattr(module, name, value.clone() if value.data_ptr() == buffer.data_ptr() else value)
    return graph


def operator_name(node: fx.Node) -> str:
    """Of a call of a function, without its overload."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.rpartition("::")[2] if schema is not None else getattr(node.target, "__name__", str(node.target))
