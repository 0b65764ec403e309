"""From masked to compact: remove zeroed filters so that the network computes exactly what it computed with them.

A removed channel is not always zero for the next layer: behind a zeroed filter, batch norm and ReLU still emit a
constant. Constants are measured, pushed exactly through the next layer (a bias, or one value per kernel tap where the
convolution pads with zeros), and the result is compared with the masked network before anything is changed.

Source: Soft Filter Pruning, section 1.1.5 of the specification.
Differs: the reference compensates only the last batch norm of a block and silently drops the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tersenet.errors import GraphError
from tersenet.graph import lookup
from tersenet.graph.constants import Measured, NotConstant, constants_of, measure, push_through
from tersenet.graph.edits import Adapt, Keep, Resize
from tersenet.graph.labels import End, NDArrayBool
from tersenet.graph.model import Kept, ModelGraph
from tersenet.graph.proof import prove, runs_to_repeat
from tersenet.graph.shrink import axis_in, cuts
from tersenet.graph.trace import Ref, Trace, refs_in
from tersenet.graph.undo import structure_of
from tersenet.graph.units import ChannelGroup
from tersenet.nn.adapter import ChannelAdapter
from tersenet.results import Equality

Constants = Literal["auto", "exact", "zero"]
_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


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
    shifted: list[tuple[Tensor, Tensor]] = []
    undo = _undo(graph, ends, gone, shifted)
    try:
        mask(graph, kept)
        plan, zeroed, measured = _exact_plan(graph, groups, gone, constants)
        plan.keeps = keeps
        runs = runs_to_repeat(graph, gone, measured)
        _carry_out(graph, plan, shifted)
        equality = prove(graph, runs, measured)
    except BaseException:
        undo()
        raise
    return Compaction(equality, sorted(zeroed))


def _undo(
    graph: ModelGraph, ends: list[End], gone: NDArrayBool, shifted: list[tuple[Tensor, Tensor]]
) -> Callable[[], None]:
    """A function that puts back what `compact` changes: removed channels' numbers, the structure, and the tensors in
    `shifted` (tensor, what it was), which is filled later."""
    restore, known = structure_of(graph.model), dict(graph.__dict__)
    rows: list[tuple[Tensor, int, Tensor, Tensor]] = []
    for end in ends:
        if end.role == "consume":
            continue
        places = torch.from_numpy(np.flatnonzero(gone[graph.units.of[end.labels]]))
        for name in end.tensors:
            if name.endswith(_STATISTICS):
                continue
            tensor = graph.tensor(name).detach()
            axis, index = axis_in(end, tensor.dim()), places.to(tensor.device)
            rows.append((tensor, axis, index, tensor.index_select(axis, index)))

    def undo() -> None:
        restore()
        graph.__dict__.update(known)
        with torch.no_grad():
            for tensor, value in reversed(shifted):
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


@torch.no_grad()
def mask(graph: ModelGraph, kept: Kept) -> None:
    """Set the filters that make removed channels to zero. Their biases stay, and make constants of the channels."""
    gone = graph.removed(kept)
    for end in graph.ends:
        index = torch.from_numpy(np.flatnonzero(gone[graph.units.of[end.labels]]))
        if end.role == "produce" and len(index):
            weight = graph.tensor(end.tensors[0])
            weight.index_fill_(end.axis, index.to(weight.device), 0)


def _carry_out(graph: ModelGraph, plan: _Plan, shifted: list[tuple[Tensor, Tensor]]) -> None:
    for edit in plan.keeps:
        graph.apply(edit)
    for name, delta in plan.shifts.items():
        tensor = graph.tensor(name).detach()
        shifted.append((tensor, tensor.clone()))
        tensor += delta.to(tensor)
    for edit in plan.adapts:
        graph.apply(edit)
    for (module, name), value in plan.buffers.items():
        # New buffers are zero; taps from an earlier compaction stay, and the new ones are added.
        holder = lookup.submodule(graph.model, module)
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
        wide = [u for s, g in scattered.items() if s in end.fed_by for u in g.units]
        incoming = ~removed | np.isin(of[end.reads], wide) if wide else ~removed
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
    layer = lookup.submodule(graph.model, end.layer)
    mean = _mean_behind(graph.trace, end) if everywhere else None
    if everywhere and (getattr(layer, "bias", None) is not None or mean is not None):
        total = taps.reshape(len(taps), -1).sum(1)
        plan.shifts[mean or f"{end.layer}.bias"] = -total if mean else total
        return
    holder = end.layer.rpartition(".")[0]
    adapter = lookup.submodule(graph.model, holder)
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
    """gamma = beta = 0 in every batch norm of a group, and no bias, for its removed channels, whose filters `mask` has
    made zero."""
    # An end may carry channels of other groups too, whose constants are compensated.
    silent = np.zeros_like(gone)
    silent[group.units] = gone[group.units]
    for member in group.members:
        end = graph.ends[member.end]
        if end.role == "consume":
            continue
        places = torch.from_numpy(np.flatnonzero(silent[graph.units.of[end.labels]]))
        for name in end.tensors[1:] if end.role == "produce" else end.tensors:
            if name.endswith(_STATISTICS):
                continue
            tensor = graph.tensor(name)
            tensor.index_fill_(axis_in(end, tensor.dim()), places.to(tensor.device), 0)


def _need_module(graph: ModelGraph, end: End, group: ChannelGroup) -> None:
    module = lookup.submodule(graph.model, end.layer)
    if isinstance(module, ChannelAdapter) or len(end.uses) > 1 or not end.layer:
        raise GraphError(f"{group.name} can't be put back behind {end.layer or 'the network'}; use residual: coupled")
