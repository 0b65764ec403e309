"""From masked to compact: remove zeroed filters so that the network computes exactly what it computed with them.

A removed channel is not always zero for the next layer: behind a zeroed filter, batch norm and ReLU still emit a
constant. Constants are measured, pushed exactly through the next layer (a bias, or one value per kernel tap where the
convolution pads with zeros), and the result is compared with the masked network before anything is changed.

Source: Soft Filter Pruning, section 1.1.5 of the specification.
Differs: the reference compensates only the last batch norm of a block and silently drops the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph.constants import Measured, NotConstant, constants_of, measure, push_through
from tersenet.graph.edits import Adapt, Keep, Resize
from tersenet.graph.labels import End, NDArrayBool
from tersenet.graph.model import Kept, ModelGraph, random_like
from tersenet.graph.precision import full_float32
from tersenet.graph.replay import Run, free_run
from tersenet.graph.shrink import axis_in, cuts
from tersenet.graph.trace import Ref, Trace, first_line, refs_in, running, tensors_in, user_line
from tersenet.graph.undo import structure_of
from tersenet.graph.units import ChannelGroup
from tersenet.nn.adapter import ChannelAdapter
from tersenet.results import Equality

Constants = Literal["auto", "exact", "zero"]


@dataclass
class Compaction:
    """What `compact` did. `zeroed` are the groups whose batch norms and biases had to be silenced because exactness
    was not to be had otherwise (or was asked for)."""

    equality: Equality
    zeroed: list[str] = field(default_factory=list[str])


@dataclass
class _Plan:
    keeps: list[Keep | Resize] = field(default_factory=list[Keep | Resize])
    adapts: list[Adapt] = field(default_factory=list[Adapt])
    buffers: dict[tuple[str, str], Tensor] = field(default_factory=dict[tuple[str, str], Tensor])
    shifts: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def compact(graph: ModelGraph, kept: Kept, constants: Constants = "auto") -> Compaction:
    """Zero what is not in `kept`, then remove it, by edits.

    Args:
        constants: what happens to the constants that biases and batch norm emit for removed channels. `exact`: they
            are compensated, or the call is refused. `zero`: biases and batch norms are silenced (gamma = beta = 0)
            before. `auto`: compensated where that can be exact, silenced elsewhere.

    Raises:
        GraphError: frozen groups, or a compact network that would not equal the masked one. Nothing is changed then.
    """
    gone = graph.removed(kept)
    groups = [g for g in graph.groups if gone[g.units].any()]
    ends = [graph.ends[end] for end in {member.end for group in groups for member in group.members}]
    keeps = cuts(graph.model, graph.trace, graph.found, graph.units, graph.fixed.mends, gone)
    undo = _undo(graph, ends, gone)
    try:
        mask(graph, kept)
        plan, zeroed, measured = _exact_plan(graph, groups, gone, constants)
        plan.keeps = keeps
        runs = _runs(graph, gone, measured)
        _carry_out(graph, plan)
        equality = max((_prove(graph, run) for run in runs), key=lambda equality: equality.relative)
    except BaseException:
        undo()
        raise
    return Compaction(equality, sorted(zeroed))


def _undo(graph: ModelGraph, ends: list[End], gone: NDArrayBool) -> Callable[[], None]:
    """A function that puts back what `compact` changes: removed channels' numbers, biases, and the structure."""
    restore, known = structure_of(graph.model), dict(graph.__dict__)
    rows: list[tuple[Tensor, int, Tensor, Tensor]] = []
    for end in ends:
        for name in () if end.role == "consume" else end.tensors:
            tensor = graph.tensor(name).detach()
            axis = axis_in(end, tensor.dim())
            index = torch.from_numpy(np.flatnonzero(gone[graph.units.of[end.labels]])).to(tensor.device)
            rows.append((tensor, axis, index, tensor.index_select(axis, index)))
    shifted = [t for n, t in graph.model.state_dict(keep_vars=True).items() if n.endswith((".bias", ".running_mean"))]
    values = [(tensor, tensor.detach().clone()) for tensor in shifted]

    def undo() -> None:
        restore()
        graph.__dict__.update(known)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
            for tensor, axis, index, value in reversed(rows):
                tensor.index_copy_(axis, index, value)

    return undo


def _exact_plan(
    graph: ModelGraph, groups: list[ChannelGroup], gone: NDArrayBool, constants: Constants
) -> tuple[_Plan, set[str], Measured]:
    """The edits, the groups that had to be silenced for them, and what was measured on the masked network."""
    zeroed: set[str] = {g.name for g in groups} if constants == "zero" else set()
    for group in groups:
        if group.name in zeroed:
            silence(graph, group, gone)
    while True:
        measured = measure(graph, gone, {g.scatter for g in groups if g.scatter is not None})
        try:
            return _plan(graph, groups, gone, measured), zeroed, measured
        except NotConstant as problem:
            if constants == "exact" or problem.groups <= zeroed:
                raise GraphError(
                    f"removed channels of {', '.join(sorted(problem.groups))} are not constant at {problem}: the "
                    "compact network would differ. Leave them out (exclude), or use constants: zero"
                ) from None
            for group in groups:
                if group.name in problem.groups - zeroed:
                    silence(graph, group, gone)
            zeroed |= problem.groups


def _runs(graph: ModelGraph, gone: NDArrayBool, measured: Measured) -> list[Run]:
    """What the masked network gave: with the choices of the trace, which leave no layer out, and with its own ones."""
    inputs = random_like(graph.example, measured.seed)
    free = free_run(graph, gone, inputs)
    traced = Run(inputs, graph.trace.choices, measured.outputs[-1], measured.read)
    # Where nothing is found, there is nothing to compare.
    return [traced, free] if free is not None and any(x.numel() for x in [*free.outputs, *free.read]) else [traced]


def _prove(graph: ModelGraph, run: Run) -> Equality:
    """Compare the compact network with what the masked one gave. Raises: GraphError if it does not run, or differs."""
    try:
        compacted = run.repeated(graph.model)
    except Exception as error:
        raise GraphError(
            f"{type(graph.model).__name__} does not run with fewer channels{user_line(error)}: {first_line(error)}. "
            "Numbers of channels are probably fixed in its forward: take them from the tensors' shapes there, or leave "
            "the layers before that line out (exclude). Nothing was removed"
        ) from error
    equality = _difference([*run.outputs, *run.read], [*compacted.outputs, *compacted.read], samples=graph.batch)
    equality = equality.model_copy(update={"relative": max(equality.relative, _apart(run.read, compacted.read))})
    if not equality.relative <= equality.tolerance:
        raise GraphError(
            f"the compact network differs from the masked one by {equality.relative:.2g} of the largest output "
            f"(allowed {equality.tolerance:.0e}); nothing was removed. Perhaps a branch in its forward depends on "
            "numbers of channels: take it out, use another rate, or leave layers out (exclude)"
        )
    return equality


def _apart(masked: list[Tensor], compacted: list[Tensor]) -> float:
    """The largest relative difference of what is chosen from, each relative to its own size: scores are small beside
    boxes in pixels."""
    largest = [float(x.abs().amax()) if x.numel() else 0.0 for x in masked]
    least = max([1e-30, *(1e-4 * size for size in largest)])
    pairs = zip(masked, compacted, largest, strict=True)
    return max([float((x - y).abs().amax()) / max(size, least) for x, y, size in pairs if x.numel()], default=0.0)


@torch.no_grad()
def mask(graph: ModelGraph, kept: Kept) -> None:
    """Set the filters that make removed channels to zero. Their biases stay, and make constants of the channels."""
    gone = graph.removed(kept)
    for end in graph.ends:
        index = torch.from_numpy(np.flatnonzero(gone[graph.units.of[end.labels]]))
        if end.role == "produce" and len(index):
            weight = graph.tensor(end.tensors[0])
            weight.index_fill_(end.axis, index.to(weight.device), 0)


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


def _carry_out(graph: ModelGraph, plan: _Plan) -> None:
    for edit in plan.keeps:
        graph.apply(edit)
    for name, delta in plan.shifts.items():
        shifted = graph.tensor(name).detach()
        shifted += delta.to(shifted)
    for edit in plan.adapts:
        graph.apply(edit)
    for (module, name), value in plan.buffers.items():
        # New buffers are zero; taps from an earlier compaction stay, and the new ones are added.
        holder = graph.model.get_submodule(module)
        buffer = holder.get_buffer(name)
        setattr(holder, name, buffer + value.to(buffer))


def _plan(graph: ModelGraph, groups: list[ChannelGroup], gone: NDArrayBool, measured: Measured) -> _Plan:
    of = graph.units.of
    plan = _Plan()
    scattered = {g.scatter: g for g in groups if g.scatter is not None}
    constants = constants_of(graph, gone, measured)
    wraps: dict[str, dict[str, Any]] = {}
    for index, group in scattered.items():
        end = graph.ends[index]
        removed = gone[of[end.labels]]
        wraps.setdefault(end.layer, {}).update(scatter=tuple(np.flatnonzero(~removed).tolist()), width=len(end.labels))
        _need_module(graph, end, group)
        values = torch.zeros(len(end.labels), dtype=torch.float64)
        values[torch.from_numpy(np.flatnonzero(removed))] = constants[index]
        plan.buffers[end.layer, "constant"] = values
    for index, end in enumerate(graph.ends):
        if end.role != "consume" or end.reads is None:
            continue
        removed = gone[of[end.reads]]
        if not removed.any():
            continue
        wide = np.isin(of[end.reads], [u for s, g in scattered.items() if s in end.fed_by for u in g.units])
        incoming = ~removed | wide
        if (incoming & removed).any():
            wraps.setdefault(end.layer, {})["gather"] = tuple(np.flatnonzero(~removed[incoming]).tolist())
        if index in constants and bool((constants[index] != 0).any()):
            made = push_through(graph, end, gone, constants[index], measured.weights.get(index))
            _compensate(graph, end, gone, made, plan, wraps)
    plan.adapts = [Adapt(module=module, **settings) for module, settings in wraps.items()]
    return plan


def _compensate(
    graph: ModelGraph,
    end: End,
    gone: NDArrayBool,
    made: tuple[Tensor, bool],
    plan: _Plan,
    wraps: dict[str, dict[str, Any]],
) -> None:
    """What a layer makes of constant inputs goes into its bias, into the mean that a batch norm behind it subtracts, or
    into the taps of an adapter around it."""
    taps, everywhere = made
    producing = next(e for e in graph.ends if e.role == "produce" and e.layer == end.layer)
    # The layer's own removed filters are zero, and so is what they make of constants.
    taps = taps[torch.from_numpy(~gone[graph.units.of[producing.labels]])]
    layer = graph.model.get_submodule(end.layer)
    mean = _mean_behind(graph.trace, end) if everywhere else None
    if everywhere and (getattr(layer, "bias", None) is not None or mean is not None):
        total = taps.reshape(len(taps), -1).sum(1)
        plan.shifts[mean or f"{end.layer}.bias"] = -total if mean else total
        return
    holder = end.layer.rpartition(".")[0]
    adapter = graph.model.get_submodule(holder)
    if not isinstance(adapter, ChannelAdapter) or "taps" not in dict(adapter.named_buffers(recurse=False)):
        holder = end.layer
        wraps.setdefault(holder, {})["taps"] = True
    plan.buffers[holder, "taps"] = taps


def _mean_behind(trace: Trace, end: End) -> str | None:
    """The running mean of a batch norm, if it alone reads what a layer makes, and nothing else."""
    readers = [op for use in end.uses for op in trace.readers.get(trace.ops[use].result, [])]
    if len(readers) != 1 or readers[0].name != "native_batch_norm" or readers[0].args[5]:
        return None
    if any(trace.ops[use].result in refs_in(trace.outputs) for use in end.uses):
        return None
    mean = readers[0].args[3]
    alone = isinstance(mean, Ref) and len(trace.readers[mean]) == 1 and len(end.uses) == 1
    return trace.slots[mean.slot].parameter if alone else None


@torch.no_grad()
def silence(graph: ModelGraph, group: ChannelGroup, gone: NDArrayBool) -> None:
    """gamma = beta = 0 in every batch norm of a group, and no bias, for its removed channels."""
    for member in group.members:
        end = graph.ends[member.end]
        # An end may carry channels of other groups too, whose constants are compensated.
        units = graph.units.of[end.labels]
        places = torch.from_numpy(np.flatnonzero(gone[units] & np.isin(units, group.units)))
        for name in () if end.role == "consume" else end.tensors:
            if name.endswith((".running_mean", ".running_var", ".num_batches_tracked")):
                continue
            tensor = graph.tensor(name)
            tensor.index_fill_(axis_in(end, tensor.dim()), places.to(tensor.device), 0)


def _need_module(graph: ModelGraph, end: End, group: ChannelGroup) -> None:
    module = graph.model.get_submodule(end.layer)
    if isinstance(module, ChannelAdapter) or len(end.uses) > 1 or not end.layer:
        raise GraphError(f"{group.name} can't be put back behind {end.layer or 'the network'}; use residual: coupled")
