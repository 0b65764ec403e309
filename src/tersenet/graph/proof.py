"""The proof that a compact network computes what the masked one computed: both run on the same noise."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph.constants import Measured
from tersenet.graph.example import random_like
from tersenet.graph.labels import NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.graph.precision import full_float32
from tersenet.graph.replay import Run, free_run
from tersenet.graph.trace import first_line, running, tensors_in, user_line
from tersenet.results import Equality


def runs_to_repeat(graph: ModelGraph, gone: NDArrayBool, measured: Measured) -> list[Run]:
    """What the masked network gave: with the choices of the trace, which leave no layer out, and with its own ones."""
    inputs = random_like(graph.example, measured.seed)
    free = free_run(graph, gone, inputs)
    traced = Run(inputs, graph.trace.choices, measured.outputs[-1], measured.read)
    # Where nothing is found, there is nothing to compare.
    return [traced, free] if free is not None and any(x.numel() for x in [*free.outputs, *free.read]) else [traced]


def prove(graph: ModelGraph, runs: list[Run], measured: Measured) -> Equality:
    """Compare the compact network with what the masked one gave.

    Raises:
        GraphError: it does not run, or differs.
    """
    equality = max((_compared(graph, run) for run in runs), key=lambda equality: equality.relative)
    equality = equality.model_copy(update={"response": _response(measured.outputs, graph.batch)})
    limit = equality.tolerance
    if equality.response is not None and not equality.telling:
        # What does not depend on the input says nothing; rounding is still that of the whole.
        limit = max(limit * equality.response, 64 * torch.finfo(runs[0].outputs[0].dtype).eps)
    if not equality.relative <= limit:
        raise GraphError(
            f"the compact network differs from the masked one by {equality.relative:.2g} of the largest output "
            f"(allowed {limit:.0e}); nothing was removed. Perhaps a branch in its forward depends on "
            "numbers of channels: take it out, use another rate, or leave layers out (exclude)"
        )
    return equality


def _response(outputs: list[list[Tensor]], batch: int) -> float | None:
    """How far the outputs of two noise inputs, or of two samples, are apart, relative to the largest output."""
    first = [_number(x) for x in outputs[0]]
    if len(outputs) > 1:
        pairs = [(x, _number(y)) for x, y in zip(first, outputs[1], strict=True) if x.shape == y.shape]
    else:
        pairs = [(x[:1], x[1:]) for x in first if batch > 1 and x.dim() and x.shape[0] == batch]
    sizes = [(float((x - y).abs().amax()), float(y.abs().amax())) for x, y in pairs if y.numel()]
    return max(moved for moved, _ in sizes) / max(1e-30, *(size for _, size in sizes)) if sizes else None


def _compared(graph: ModelGraph, run: Run) -> Equality:
    try:
        compacted = run.repeated(graph.model)
    except Exception as error:
        raise GraphError(
            f"{type(graph.model).__name__} does not run with fewer channels{user_line(error)}: {first_line(error)}. "
            "Numbers of channels are probably fixed in its forward: take them from the tensors' shapes there, or leave "
            "the layers before that line out (exclude). Nothing was removed"
        ) from error
    equality = _difference([*run.outputs, *run.read], [*compacted.outputs, *compacted.read], samples=graph.batch)
    return equality.model_copy(update={"relative": max(equality.relative, _apart(run.read, compacted.read))})


def _apart(masked: list[Tensor], compacted: list[Tensor]) -> float:
    """A tenth of the largest relative difference of what is chosen from, each relative to its own size: scores are
    small beside boxes in pixels, and have lost a digit on the way through roots and products."""
    largest = [float(x.abs().amax()) if x.numel() else 0.0 for x in masked]
    least = max([1e-30, *(1e-4 * size for size in largest)])
    pairs = zip(masked, compacted, largest, strict=True)
    return max([float((x - y).abs().amax()) / max(size, least) for x, y, size in pairs if x.numel()], default=0.0) / 10


def compare(a: nn.Module, b: nn.Module, example: tuple[Any, ...]) -> Equality:
    """The largest difference between a masked network's and a compact one's outputs in evaluation mode, on noise
    shaped like `example`.

    Raises:
        GraphError: outputs of different shapes, not finite, or without any number: there is nothing to compare.
    """
    return _difference(*_run_both(a, b, example), samples=int(example[0].shape[0]))


def _run_both(a: nn.Module, b: nn.Module, example: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    inputs = random_like(example, seed=7)
    with running(a), running(b), full_float32():
        return tensors_in(a(*copy.deepcopy(inputs))), tensors_in(b(*copy.deepcopy(inputs)))


def _difference(masked: list[Tensor], compacted: list[Tensor], samples: int) -> Equality:
    shapes, others = [[tuple(x.shape) for x in outputs] for outputs in (masked, compacted)]
    if shapes != others:
        raise GraphError(
            f"the outputs of the compact network have the shapes {others}, the masked one's {shapes}: numbers of "
            "channels reach the output. Nothing was removed; leave the last layers out (exclude)"
        )
    if not any(x.numel() for x in masked):
        raise GraphError("the network's output holds no tensors that could be compared; nothing was removed")
    for outputs, which in ((masked, "masked"), (compacted, "compact")):
        if not all(bool(x.isfinite().all()) for x in outputs):
            raise GraphError(
                f"the outputs of the {which} network are not finite (NaN or infinite), so that they can't be compared; "
                "nothing was removed. Check its weights and batch norm statistics"
            )
    pairs = [(_number(x), _number(y)) for x, y in zip(masked, compacted, strict=True) if x.numel()]
    largest = max(float((x - y).abs().amax()) for x, y in pairs)
    scale = max(float(x.abs().amax()) for x, _ in pairs)
    return Equality(
        max_abs=largest,
        relative=largest / max(scale, 1e-30),
        tolerance=1e-10 if masked[0].dtype == torch.float64 else 1e-5,
        samples=samples,
    )


def _number(x: Tensor) -> Tensor:
    """Truth values and integers as float64: the former can't be subtracted."""
    return x if x.is_floating_point() or x.is_complex() else x.double()
