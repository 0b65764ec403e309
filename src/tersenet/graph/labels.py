"""The network run on channel labels.

Every activation becomes an integer tensor of the same shape that says which channel each value belongs to. Layers make
fresh labels and record which tensor axes carry them; data movement runs itself on the labels; elementwise operators
merge the labels that meet. What is merged must be kept or removed as one.

Label 0 means "no channel of its own": attention maps, sums over channels. Axes along which the labels don't change are
stride-0 expansions, so a label tensor costs as much as its channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tersenet.graph import lookup
from tersenet.graph.trace import Op, Ref, Slot, Trace, children

Residual = Literal["coupled", "independent"]
IntArray = NDArray[np.int64]
Rule = Callable[["Labeller", Op], Any]
NDArrayBool = NDArray[np.bool_]
Key = tuple[str, int]


@dataclass
class End:
    """One axis, of one or more tensors, that carries channel labels.

    `produce`: the axis makes these channels (a filter). `pass`: each channel is treated on its own (batch norm,
    depthwise). `consume`: the channels are read and mixed; without tensors, by an operator such as a sum.
    `attributes` are module sizes that shrink in proportion. `reads` are the labels of the whole activation that a
    `consume` end reads (longer than `labels` in a grouped convolution), along `reads_axis` of the operator's argument
    `reads_argument`. `computed`: the layer's weights are not the parameter itself. `fed_by` are the ends through which
    the data came last. `uses` are operators of the trace.
    """

    role: Literal["produce", "pass", "consume"]
    layer: str
    tensors: tuple[str, ...]
    axis: int
    labels: IntArray
    uses: list[int]
    attributes: tuple[tuple[str, str], ...] = ()
    fed_by: frozenset[int] = frozenset()
    reads: IntArray | None = None
    reads_axis: int = 1
    reads_argument: int = 0
    computed: bool = False


@dataclass
class LayerUse:
    """One application of a layer, or one product of activations, for counting. `macs` are per example batch, and go
    down with the share of every label vector in `scales` that is kept."""

    name: str
    macs: int
    scales: tuple[IntArray, ...]


@dataclass
class Value:
    """An activation: its labels, and the ends that it came through last.

    `weighs`: an attention map. What is added to it changes no channel that is zero behind it. `shifted`: one number was
    added to all channels, so that a channel that was zero no longer is.
    """

    labels: Tensor
    origin: frozenset[int] = frozenset()
    weighs: bool = False
    shifted: bool = False


@dataclass
class Weight:
    """A parameter, or what is computed of parameters only: for every parameter axis that is in it, a label tensor of
    its shape. `name` is that of an untouched parameter. `moved`: its values are a parameter's, at other places."""

    shape: tuple[int, ...]
    axes: dict[Key, Tensor]
    name: str | None = None
    moved: bool = False


@dataclass
class Table:
    """Labels in rows and columns of which only whole rows, or whole columns, can go: Python regroups channels by
    numbers that it computes. `free` are the axes along which entries may be missing."""

    labels: IntArray
    free: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Statistic:
    """An operator that takes a mean or a variance over channels, along `axis` of its first argument."""

    op: int
    axis: int
    labels: IntArray


@dataclass
class Labelling:
    """Everything that one run on labels found."""

    ends: list[End] = field(default_factory=list[End])
    layers: list[LayerUse] = field(default_factory=list[LayerUse])
    merges: list[tuple[IntArray, IntArray]] = field(default_factory=list[tuple[IntArray, IntArray]])
    tables: list[Table] = field(default_factory=list[Table])
    frozen: list[tuple[IntArray, str]] = field(default_factory=list[tuple[IntArray, str]])
    statistics: list[Statistic] = field(default_factory=list[Statistic])
    scatters: list[tuple[IntArray, frozenset[int], str]] = field(
        default_factory=list[tuple[IntArray, frozenset[int], str]]
    )
    sources: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    results: dict[int, list[list[Tensor]]] = field(default_factory=dict[int, list[list[Tensor]]])
    count: int = 1

    def freeze_around(self, op: Op, reason: str) -> None:
        """Freeze the channels that an operator makes and, where it only passes them on, those that it reads."""
        held = [labels for result in self.results.get(op.number, []) for labels in result]
        for labels in [*held, *([self.sources[op.number]] if op.number in self.sources else [])]:
            small = compressed(labels).numpy()
            self.frozen.append((np.unique(small[small != 0]), reason))


class Labeller:
    """Runs a trace on labels. The operator rules are in `tersenet.graph.rules`."""

    def __init__(self, model: nn.Module, trace: Trace, residual: Residual) -> None:
        self.model = model
        self.trace = trace
        self.residual: Residual = residual
        self.out = Labelling()
        self.values: dict[int, Any] = {}
        self.modules = lookup.named_modules(model)
        self._axis_labels: dict[Key, IntArray] = {}
        self._end_index: dict[tuple[str, int, str], int] = {}

    def run(self) -> Labelling:
        from tersenet.graph.rules import apply_rule

        for slot in self.trace.inputs:
            self.values[slot] = self._input(slot)
        for op in self.trace.ops:
            source = self.get(op.args[0]) if op.args else None
            if isinstance(source, Value):
                self.out.sources[op.number] = source.labels
            result = apply_rule(self, op)
            results = result if isinstance(result, list) else [result]
            refs = op.result if isinstance(op.result, list) else [op.result]
            self.out.results[op.number] = [_held(r) for r in results]
            for ref, value in zip(refs, results, strict=False):
                if isinstance(ref, Ref) and value is not None:
                    self.values[ref.slot] = value
        for value in flatten(self.get(self.trace.outputs)):
            self.freeze(value, "the network's output")
        return self.out

    def get(self, arg: Any) -> Any:
        """An operator's argument with every tensor replaced by its value: None for constants."""
        if isinstance(arg, Ref):
            if arg.slot not in self.values:
                self.values[arg.slot] = self._parameter(self.trace.slots[arg.slot])
            return self.values[arg.slot]
        if isinstance(arg, (list, tuple, dict)):
            return [self.get(a) for a in children(arg)]
        return arg

    def slot(self, arg: Any) -> Slot:
        return self.trace.slots[arg.slot]

    def shape(self, arg: Any) -> tuple[int, ...]:
        return self.slot(arg).shape

    def fresh(self, count: int) -> IntArray:
        start = self.out.count
        self.out.count += count
        return np.arange(start, start + count)

    def merge(self, a: IntArray, b: IntArray) -> None:
        """Tie labels that meet. What has no channel of its own ties nothing."""
        differs = (a != b) & (a != 0) & (b != 0)
        if differs.any():
            self.out.merges.append((a[differs], b[differs]))

    def freeze(self, value: Any, reason: str) -> None:
        labels = value.labels if isinstance(value, Value) else value
        if isinstance(labels, Tensor):
            labels = compressed(labels).numpy()
        if isinstance(labels, np.ndarray):
            self.out.frozen.append((np.unique(labels[labels != 0]), reason))

    def operands(self, op: Op) -> list[Any]:
        """The values of all of an operator's arguments, lists opened."""
        return flatten([self.get(arg) for arg in [*op.args, *op.kwargs.values()]])

    def refuse(self, op: Op, reason: str) -> Any:
        """Freeze everything that an operator reads, and what meets its results later, for the same reason."""
        for value in self.operands(op):
            if isinstance(value, Value):
                self.freeze(value, reason)
            elif isinstance(value, Weight):
                for labels in value.axes.values():
                    self.freeze(labels, reason)
        if op.name == "convolution":
            macs = math.prod(self.shape(op.result)) * math.prod(self.shape(op.args[1])[1:])
            self.out.layers.append(LayerUse(op.place.module, macs, ()))
        label = self.fresh(1)
        self.freeze(label, reason)
        refs = op.result if isinstance(op.result, list) else [op.result]
        filled = [
            Value(torch.from_numpy(label).view([1] * len(self.shape(r))).expand(self.shape(r)))
            if isinstance(r, Ref)
            else None
            for r in refs
        ]
        return filled if isinstance(op.result, list) else filled[0]

    def axis_labels(self, tensor: str, axis: int, size: int) -> IntArray:
        """The labels that a parameter axis makes: the same at every use, so reused modules tie by themselves."""
        key = (tensor, axis)
        if key not in self._axis_labels:
            self._axis_labels[key] = self.fresh(size)
        return self._axis_labels[key]

    def end(self, end: End) -> int:
        """Record `end` and return its number. A second use of the same tensor axis is merged with the first."""
        key = (
            end.tensors[0] if end.tensors else f"{end.layer}:{end.uses[0]}" if end.reads is not None else end.layer,
            end.axis,
            end.role if end.tensors or not end.attributes else end.attributes[0][1],
        )
        if key in self._end_index:
            known = self.out.ends[self._end_index[key]]
            self.merge(known.labels, end.labels)
            if known.reads is not None and end.reads is not None and len(known.reads) == len(end.reads):
                self.merge(known.reads, end.reads)
            known.fed_by |= end.fed_by
            if known.reads is None and end.reads is not None:
                # Met before where the weight is computed (a pruning mask): what counts is the layer that reads with it.
                known.reads, known.reads_axis, known.reads_argument = end.reads, end.reads_axis, end.reads_argument
                known.computed, known.uses = end.computed, list(end.uses)
            elif known.reads is None or end.reads is not None:
                known.uses += [use for use in end.uses if use not in known.uses]
            known.attributes += tuple(a for a in end.attributes if a not in known.attributes)
            return self._end_index[key]
        self._end_index[key] = len(self.out.ends)
        self.out.ends.append(end)
        return self._end_index[key]

    def table(self, labels: IntArray, free: tuple[int, ...], op: Op) -> None:
        if labels.size:
            self.out.tables.append(Table(labels, free, describe(op)))

    def module(self, name: str) -> nn.Module | None:
        return self.modules.get(name)

    def _parameter(self, slot: Slot) -> Weight | None:
        name = slot.parameter
        if name is None:
            return None
        axes = {
            (name, axis): spread(self.axis_labels(name, axis, size), slot.shape, axis)
            for axis, size in enumerate(slot.shape)
        }
        return Weight(slot.shape, axes, name, moved=True)

    def _input(self, number: int) -> Value:
        shape = self.trace.slots[number].shape
        if len(shape) < 2:
            return Value(torch.zeros(1, dtype=torch.long).expand(shape))
        listed = number in self.trace.images
        axis = 0 if listed else 1
        # Images of one list have the same channels: they are stacked.
        labels = self.axis_labels("", shape[axis], shape[axis]) if listed else self.fresh(shape[axis])
        self.freeze(labels, "the network's input")
        return Value(spread(labels, shape, axis))


def _held(value: Any) -> list[Tensor]:
    """The label tensors of a result: one of an activation, one for every parameter axis of what is computed of some."""
    if isinstance(value, Value):
        return [value.labels]
    return list(value.axes.values()) if isinstance(value, Weight) else []


def spread(labels: IntArray, shape: Any, axis: int = 1) -> Tensor:
    """Labels of a channel axis as a tensor of `shape`, the other axes with stride 0."""
    view = [1] * len(shape)
    view[axis] = len(labels)
    return torch.from_numpy(np.ascontiguousarray(labels)).view(view).expand(*shape)


def compressed(labels: Tensor) -> Tensor:
    """The same labels with every stride-0 axis cut to one entry."""
    for axis, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def slim(labels: Tensor) -> Tensor:
    """The same labels, with stride 0 along every axis along which they don't change."""
    small = compressed(labels)
    for axis in range(small.dim()):
        if small.shape[axis] > 1:
            first = small.narrow(axis, 0, 1)
            if bool((small == first).all()):
                small = first
    return small.expand(labels.shape)


def varying(labels: Tensor) -> list[int]:
    """The axes along which the labels change: after `slim`, those with a stride."""
    return [axis for axis, stride in enumerate(labels.stride()) if stride != 0 and labels.shape[axis] > 1]


def axis_vector(labels: Tensor, axis: int) -> IntArray | None:
    """The labels along `axis`, or None if they also change along another axis."""
    if labels.numel() == 0:
        return None
    axis %= labels.dim()
    if any(other != axis for other in varying(labels)):
        return None
    for other in range(labels.dim()):
        if other != axis:
            labels = labels.narrow(other, 0, 1)
    return labels.reshape(-1).numpy().copy()


def array_of(labels: Tensor, axes: list[int]) -> IntArray:
    """The labels along `axes` (increasing), at the first place of all other axes."""
    for axis in range(labels.dim()):
        if axis not in axes:
            labels = labels.narrow(axis, 0, 1)
    return labels.reshape([labels.shape[a] for a in axes]).numpy().copy()


def describe(op: Op) -> str:
    """`aten.softmax in layer4 (net.py:12)`: an operator as it is named in reasons."""
    where, module = str(op.place), op.place.module
    return f"aten.{op.name.lstrip('_')}" + (f" in {module}" if module else "") + (f" ({where})" if where else "")


def flatten(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [v for item in value for v in flatten(item)]  # pyright: ignore[reportUnknownVariableType]
    return [value]
