"""Layers behind each other as one call: what lies between them has fixed places in memory, and no Python runs.

A segment is a run of layers on generated kernels, with nothing else between them in the graph. For inputs of a new kind
its layers run one by one, and say which calls they made; after that these calls are made in a row.
"""

from __future__ import annotations

import ctypes
import operator
import threading
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn

from tersenet.errors import TersenetError
from tersenet.kernels.compiled import kernels
from tersenet.kernels.context import INDEX, Context
from tersenet.kernels.host import host
from tersenet.kernels.memory import zeros
from tersenet.kernels.sequence import Sequence, table
from tersenet.kernels.threads import Task, runtime
from tersenet.kernels.winograd import Call, Tables, scratch
from tersenet.lowering.calls import key_of, watched

_LINE = 64  # bytes
_MOST_PLANS = 8  # kinds of inputs that memory is kept for


@dataclass(frozen=True)
class Step:
    """A call of generated code. `over`: its result takes the place of the residual; `flat`: it is (N, C)."""

    call: Call
    tables: Tables
    over: bool = False
    flat: bool = False


class Stepping(Protocol):
    """A layer that can be part of a segment."""

    def step(self, x: Tensor, residual: Tensor | None = None) -> Step | None:
        """The call that forward would make; None if it does something else."""
        ...


class Segment(nn.Module):
    """Layers one behind the other. Values are numbered: the inputs first, then each layer's result."""

    def __init__(self, layers: list[nn.Module], reads: list[tuple[int, ...]], inputs: int, results: list[int]) -> None:
        """Args: reads: the values that each layer reads. results: those that are read by others."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._reads, self._inputs, self._results = reads, inputs, results
        self._plans: dict[tuple[Any, ...], _Plan | None] = {}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values: list[Tensor]
        if any(watched(x) for x in inputs):
            values = self._each(inputs)
        else:
            key = tuple(key_of(x, None) for x in inputs)
            plan = self._plans.get(key)
            if plan is not None and plan.lock.acquire(blocking=False):  # else another thread is in it
                try:
                    results = plan.run(inputs)
                finally:
                    plan.lock.release()
                return results[0] if len(results) == 1 else results
            steps: list[Step | None] | None = None if key in self._plans else []
            values = self._each(inputs, steps)
            if steps is not None:
                whole = [step for step in steps if step is not None and step.call.tasks]  # none: the batch is empty
                while len(self._plans) >= _MOST_PLANS:
                    # A copy: another thread may change it between two steps of Python.
                    self._plans.pop(next(iter(tuple(self._plans)), ()), None)
                known = len(whole) == len(steps) and _has_kernel()
                self._plans[key] = _Plan(whole, self._reads, self._results, values[: self._inputs]) if known else None
        results = tuple(values[number] for number in self._results)
        return results[0] if len(results) == 1 else results

    def _each(self, inputs: tuple[Tensor, ...], steps: list[Step | None] | None = None) -> list[Tensor]:
        values = list(inputs)
        for layer, reads in zip(self.layers, self._reads, strict=True):
            read = [values[number] for number in reads]
            if steps is not None:
                steps.append(cast(Stepping, layer).step(*read))
            values.append(layer(*read))
        return values

    def __deepcopy__(self, memo: dict[int, Any]) -> Segment:
        return self  # layers don't change


class _Plan:
    """Contexts with all addresses but those of inputs and results, and the table that runs them."""

    def __init__(
        self, steps: list[Step], reads: list[tuple[int, ...]], results: list[int], inputs: list[Tensor]
    ) -> None:
        self.lock = threading.Lock()
        self._steps, self._results = steps, results
        count = len(inputs)
        # Of values that are written over each other, the first.
        self._first = list(range(count + len(steps)))
        for number, (step, read) in enumerate(zip(steps, reads, strict=True)):
            if step.over:
                self._first[count + number] = self._first[read[1]]
        fresh = {self._first[number] for number in results}
        last = {value: number for number, read in enumerate(reads) for value in (self._first[one] for one in read)}
        lives = {
            value: (value - count, last[value], _bytes(steps[value - count]))
            for value in last
            if value >= count and value not in fresh
        }
        places, size = _placed(lives)
        self._arena = zeros((size,), torch.uint8)
        self._contexts = [Context.from_buffer_copy(step.call.context) for step in steps]
        self._patches: list[tuple[Any, int, int]] = []
        for number, (step, read, context) in enumerate(zip(steps, reads, self._contexts, strict=True)):
            for name, table_ in zip(("weight", "bias", "list", "starts"), step.tables, strict=True):
                if table_ is not None:
                    context[INDEX[name]] = table_.data_ptr()
            for name, value in (*zip("xr", read, strict=False), ("y", count + number)):
                value = self._first[value]
                if value in places:
                    context[INDEX[name]] = self._arena.data_ptr() + places[value]
                else:
                    self._patches.append((context, INDEX[name], value))
        self._fresh = {value: steps[value - count].call for value in fresh if value >= count}
        self._flat = [value for value in self._fresh if steps[value - count].flat]
        self._needs = [max((s.call.floats for s in steps if s.call.parts == kind), default=0) for kind in (False, True)]
        self._scratch = [0, 0]
        rows = [
            (task.address, ctypes.addressof(context), step.call.threads, place == 0)
            for step, context in zip(steps, self._contexts, strict=True)
            for place, task in enumerate(step.call.tasks)
        ]
        self._table = table(rows, runtime())
        self._task = next(iter(_kernel().values()))

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of the inputs' kind that the plan is for; nothing is checked."""
        found: dict[int, Tensor] = dict(enumerate(inputs))
        for value, call in self._fresh.items():
            found[value] = torch.empty(call.shape, dtype=call.dtype, memory_format=torch.channels_last)
        for context, place, value in self._patches:
            context[place] = found[value].data_ptr()
        addresses = [scratch(need, kind) if need else 0 for need, kind in zip(self._needs, (False, True), strict=True)]
        if addresses != self._scratch:  # each thread has its own, and it may grow
            for step, context in zip(self._steps, self._contexts, strict=True):
                memory = addresses[step.call.parts]
                context[INDEX["shared"]], context[INDEX["scratch"]] = memory, memory + step.call.shared_bytes
            self._scratch = addresses
        self._task.run(ctypes.addressof(self._table), 1)
        for value in self._flat:
            found[value] = found[value].flatten(1)
        return tuple(found[self._first[value]] for value in self._results)


def with_segments(graph: fx.GraphModule) -> None:
    """Put a `Segment` in the place of each run of two or more layers that can be part of one."""
    runs: list[list[fx.Node]] = [[]]
    for node in graph.graph.nodes:
        if node.op == "call_module" and hasattr(graph.get_submodule(str(node.target)), "step"):
            runs[-1].append(node)
        elif node.op not in ("placeholder", "get_attr") and runs[-1]:
            runs.append([])
    for number, run in enumerate(run for run in runs if len(run) > 1):
        _replace(graph, run, f"segment_{number}")
    graph.recompile()


def _replace(graph: fx.GraphModule, run: list[fx.Node], name: str) -> None:
    inside = set(run)
    inputs = list(dict.fromkeys(one for node in run for one in node.all_input_nodes if one not in inside))
    numbers = {node: number for number, node in enumerate([*inputs, *run])}
    results = [node for node in run if any(user not in inside for user in node.users)]
    layers = [graph.get_submodule(str(node.target)) for node in run]
    reads = [tuple(numbers[one] for one in node.args if isinstance(one, fx.Node)) for node in run]
    graph.add_module(name, Segment(layers, reads, len(inputs), [numbers[node] for node in results]))
    with graph.graph.inserting_after(run[-1]):
        call = graph.graph.call_module(name, tuple(inputs))
    for place, node in enumerate(results):
        with graph.graph.inserting_after(call):
            value = call if len(results) == 1 else graph.graph.call_function(operator.getitem, (call, place))
        value.meta = dict(node.meta)
        node.replace_all_uses_with(value, lambda user: user not in inside)
    for node in reversed(run):
        graph.graph.erase_node(node)
        graph.delete_submodule(str(node.target))


def _placed(lives: dict[int, tuple[int, int, int]]) -> tuple[dict[int, int], int]:
    """Places in one piece of memory, and its size: values whose lives (first step, last step, bytes) touch don't
    overlap. Large ones come first, each to the lowest place that is free."""
    places: dict[int, int] = {}
    for value, (begin, end, size) in sorted(lives.items(), key=lambda one: -one[1][2]):
        near = [one for one in places if lives[one][0] <= end and begin <= lives[one][1]]
        place = 0
        for other in sorted(near, key=places.__getitem__):
            if place + size <= places[other]:
                break
            place = max(place, places[other] + lives[other][2])
        places[value] = place
    return places, max((places[value] + lives[value][2] for value in places), default=0)


def _bytes(step: Step) -> int:
    numbers = step.call.shape[0] * step.call.shape[1] * step.call.shape[2] * step.call.shape[3]
    return -(-numbers * step.call.dtype.itemsize // _LINE) * _LINE


def _kernel() -> dict[str, Task]:
    return kernels(Sequence(host().isa())).tasks


def _has_kernel() -> bool:
    try:
        return bool(_kernel())
    except TersenetError:
        return False
