"""The network run on channel labels.

Every activation becomes an integer tensor of the same shape that says which channel each value belongs to. Layers make
fresh labels and record which tensor axes carry them; data movement runs itself on the labels; elementwise operators
merge the labels that meet. What is merged must be kept or removed as one.

Label 0 means "no channel of its own" and is frozen. Spatial axes are stride-0 expansions, so a label tensor costs as
much as its channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Node

from tersenet.graph.trace import Trace, module_of, where
from tersenet.nn.adapter import ChannelAdapter

Residual = Literal["coupled", "independent"]
IntArray = NDArray[np.int64]
Rule = Callable[["Labeller", Node], Any]


@dataclass
class End:
    """One axis, of one or more tensors, that carries channel labels.

    `produce`: the axis makes these channels (a filter). `pass`: each channel is treated on its own (batch norm,
    depthwise). `consume`: the channels are read and mixed. `attributes` are module integers that shrink in proportion.
    `reads` are the labels of the whole activation that a `consume` end reads (longer than `labels` in a grouped
    convolution). `fed_by` are the ends through which the data came last. `nodes` are its uses in the trace.
    """

    role: Literal["produce", "pass", "consume"]
    layer: str
    tensors: tuple[str, ...]
    axis: int
    labels: IntArray
    nodes: list[Node]
    attributes: tuple[tuple[str, str], ...] = ()
    fed_by: frozenset[int] = frozenset()
    reads: IntArray | None = None


@dataclass
class LayerUse:
    """One application of a convolution or linear layer, for counting. `macs` are per example batch."""

    name: str
    macs: int
    produces: int
    consumes: int | None


@dataclass
class Value:
    """An activation: its labels, and the ends that it came through last."""

    labels: Tensor
    origin: frozenset[int] = frozenset()


@dataclass
class Labelling:
    """Everything that one run on labels found."""

    ends: list[End] = field(default_factory=list[End])
    layers: list[LayerUse] = field(default_factory=list[LayerUse])
    merges: list[tuple[IntArray, IntArray]] = field(default_factory=list[tuple[IntArray, IntArray]])
    frozen: list[tuple[IntArray, str]] = field(default_factory=list[tuple[IntArray, str]])
    scatters: list[tuple[IntArray, frozenset[int], str]] = field(
        default_factory=list[tuple[IntArray, frozenset[int], str]]
    )
    count: int = 1


class Labeller:
    """Runs a trace on labels. The operator rules are in `tersenet.graph.rules`."""

    def __init__(self, model: nn.Module, trace: Trace, residual: Residual) -> None:
        self.model = model
        self.trace = trace
        self.residual: Residual = residual
        self.out = Labelling()
        self.values: dict[Node, Any] = {}
        self._axis_labels: dict[tuple[str, int], IntArray] = {}
        self._end_index: dict[tuple[str, int, str], int] = {}
        self._tied = _tied_tensors(model)

    def run(self) -> Labelling:
        from tersenet.graph.rules import apply_rule

        for node in self.trace.nodes:
            if node.op == "placeholder":
                self.values[node] = self._placeholder(node)
            elif node.op == "call_function":
                self.values[node] = apply_rule(self, node)
            elif node.op == "output":
                for value in _flatten([self.get(arg) for arg in node.args]):
                    self.freeze(value, "the network's output")
        return self.out

    def get(self, arg: Any) -> Any:
        """An operator's argument with every node replaced by its value."""
        if isinstance(arg, Node):
            return self.values.get(arg)
        if isinstance(arg, (list, tuple)):
            return [self.get(a) for a in arg]  # pyright: ignore[reportUnknownVariableType]
        return arg

    def fresh(self, count: int) -> IntArray:
        start = self.out.count
        self.out.count += count
        return np.arange(start, start + count)

    def merge(self, a: IntArray, b: IntArray) -> None:
        differs = a != b
        if differs.any():
            self.out.merges.append((a[differs], b[differs]))

    def freeze(self, value: Any, reason: str) -> None:
        labels = value.labels if isinstance(value, Value) else value
        if isinstance(labels, Tensor):
            self.out.frozen.append((np.unique(compressed(labels).numpy()), reason))
        elif isinstance(labels, np.ndarray):
            self.out.frozen.append((np.unique(labels), reason))

    def operands(self, node: Node) -> list[Any]:
        """The values of all of an operator's arguments, lists opened."""
        found: list[Any] = []
        for arg in [*node.args, *node.kwargs.values()]:
            value = self.get(arg)
            found.extend(value if isinstance(value, list) else [value])
        return found

    def refuse(self, node: Node, reason: str) -> Any:
        """Freeze everything that an operator reads, and what meets its results later, for the same reason."""
        for value in self.operands(node):
            if isinstance(value, Value):
                self.freeze(value, reason)
        label = self.fresh(1)
        self.freeze(label, reason)
        return _filled(node.meta.get("val"), torch.from_numpy(label))

    def parameter_name(self, node: Any) -> str | None:
        return self.trace.tensors.get(node.name) if isinstance(node, Node) else None

    def axis_labels(self, tensor: str, axis: int, size: int) -> IntArray:
        """The labels that a parameter axis makes: the same at every use, so reused modules tie by themselves."""
        key = (tensor, axis)
        if key not in self._axis_labels:
            self._axis_labels[key] = self.fresh(size)
        return self._axis_labels[key]

    def end(self, end: End) -> int:
        """Record `end` and return its number. A second use of the same tensor axis is merged with the first."""
        for name in end.tensors:
            if name in self._tied:
                self.freeze(end.labels, f"{name} is the same tensor as {self._tied[name]} of another module")
        key = (
            end.tensors[0] if end.tensors else end.layer,
            end.axis,
            end.role if end.tensors else end.attributes[0][1],
        )
        if key in self._end_index:
            known = self._end_index[key]
            self.merge(self.out.ends[known].labels, end.labels)
            self.out.ends[known].fed_by |= end.fed_by
            self.out.ends[known].nodes += end.nodes
            return known
        self._end_index[key] = len(self.out.ends)
        self.out.ends.append(end)
        return self._end_index[key]

    def module(self, name: str) -> nn.Module | None:
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def _placeholder(self, node: Node) -> Value | None:
        name = self.trace.tensors.get(node.name, "")
        owner = name.rpartition(".")[0]
        if name.endswith(".taps") and isinstance(self.module(owner), ChannelAdapter):
            # Computed with before they meet the channels that they belong to, so they carry labels of their own.
            taps = self.axis_labels(name, 0, int(node.meta["val"].shape[0]))
            self.end(End("pass", owner, (name,), 0, taps, [node]))
            return Value(spread(taps, node.meta["val"].shape, axis=0))
        if node.name not in self.trace.inputs or not isinstance(node.meta.get("val"), Tensor):
            return None
        shape = node.meta["val"].shape
        if len(shape) < 2:
            return Value(torch.zeros(1, dtype=torch.long).expand(shape))
        labels = self.fresh(int(shape[1]))
        self.freeze(labels, "the network's input")
        return Value(spread(labels, shape))


def _tied_tensors(model: nn.Module) -> dict[str, str]:
    """Names of parameters that belong to more than one module -> the name in the other module.

    Cutting one would break the tie. A module that is registered or used twice is one module and may be cut.
    """
    first: dict[int, tuple[int, str]] = {}
    tied: dict[str, str] = {}
    for path, module in model.named_modules():
        for name, tensor in [*module.named_parameters(path, False), *module.named_buffers(path, False)]:
            owner, other = first.setdefault(id(tensor), (id(module), name))
            if owner != id(module):
                tied |= {name: other, other: name}
    return tied


def spread(labels: IntArray, shape: Any, axis: int = 1) -> Tensor:
    """Labels of a channel axis as a tensor of `shape`, the other axes with stride 0."""
    view = [1] * len(shape)
    view[axis] = len(labels)
    return torch.from_numpy(labels).view(view).expand(*shape)


def compressed(labels: Tensor) -> Tensor:
    """The same labels with every stride-0 axis cut to one entry."""
    for axis, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def axis_vector(labels: Tensor, axis: int) -> IntArray | None:
    """The labels along `axis`, or None if they also change along another axis."""
    small = compressed(labels)
    vector = small
    for other in range(labels.dim()):
        if other != axis % labels.dim() and vector.shape[other] > 1:
            first = vector.narrow(other, 0, 1)
            if not bool((vector == first).all()):
                return None
            vector = first
    return vector.reshape(-1).expand(labels.shape[axis]).numpy().copy()


def describe(node: Node) -> str:
    """`aten.softmax in layer4 (net.py:12)`: an operator as it is named in reasons."""
    place = where(node)
    module = module_of(node)
    return f"{node.target}" + (f" in {module}" if module else "") + (f" ({place})" if place else "")


def _filled(meta: Any, label: Tensor) -> Any:
    if isinstance(meta, Tensor):
        return Value(label.view(()).expand(meta.shape))
    if isinstance(meta, (list, tuple)):
        return [_filled(m, label) for m in meta]  # pyright: ignore[reportUnknownVariableType]
    return None


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [v for item in value for v in _flatten(item)]  # pyright: ignore[reportUnknownVariableType]
    return [value]
