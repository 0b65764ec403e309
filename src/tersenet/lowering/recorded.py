"""A network's graph for any batch size, out of two recordings of it.

One is of a single sample, the other of so many that their number is no size in a network. Both have to call the same
operators on the same tensors. What may differ are whole numbers that are a multiple of the batch size: they are
computed of the input then. Any other difference, such as a branch that looks at the batch size, is the end.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo  # pyright: ignore
from torch.utils import _pytree as pytree

from tersenet.graph import lookup
from tersenet.graph.undo import structure_of
from tersenet.lowering.record import Call, Constant, Recording, Ref, Refused, record
from tersenet.nn.adapter import ChannelAdapter

_MANY = 1014
"""Larger than what a network compares a batch with; and 1013 is prime, so that it and 1 have not the same remainder, by
whatever a network divides a batch."""
_SIZE = torch.ops.aten.sym_size.int
_SIMPLE = (bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


@dataclass(frozen=True)
class _Batches:
    """A whole number: the batch size times `factor`."""

    factor: int


def recorded(model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule | None:
    """The operators of `model`, in the mode that it is in, as torch.export's `module()` has them, with the network's
    own tensors; `meta["val"]` is a tensor of torch's meta device, for a batch of 1014. None for inputs that are not on
    the CPU, and for a network that can't be recorded: torch.export takes more, or says what is wrong.

    The network's attributes stay as they are.
    """
    if any(x.device.type != "cpu" for x in inputs):
        return None
    paths = {id(module): path for path, module in lookup.named_modules(model).items()}
    restore = structure_of(model)
    try:
        with _plain(), torch.no_grad():
            one = _pass(model, inputs, 1, paths)
            # What the first pass left in the network is still there: if it counts, this one differs or fails.
            many = _pass(model, inputs, _MANY, paths, len(one.calls))
        return _Graph(model, one, many).built(_merged_calls(one, many), _merged(one.outputs, many.outputs))
    except Exception:  # whatever a network may raise on tensors without numbers
        return None
    finally:
        restore()


def size_at(node: fx.Node, batch: int) -> tuple[int, ...] | None:
    """The size of the tensor that a node of `recorded` makes, for a batch size; None for another graph's node."""
    sizes: list[tuple[int, int]] | None = node.meta.get("sizes")
    return None if sizes is None else tuple(n if n == many else n * batch for n, many in sizes)


@contextmanager
def _plain() -> Generator[None]:
    """Without fused attention modules, and without what torch.compile has made of parts of the network."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes a second to load
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _pass(
    model: nn.Module, inputs: tuple[Tensor, ...], batch: int, paths: dict[int, str], most: int | None = None
) -> Recording:
    for module in model.modules():
        if isinstance(module, ChannelAdapter):
            module.forget()
    shapes = (torch.empty((batch, *x.shape[1:]), dtype=x.dtype, device="meta") for x in inputs)
    return record(model, tuple(shapes), paths, most)


def _merged_calls(one: Recording, many: Recording) -> list[Call]:
    if one.structure != many.structure:
        raise Refused("outputs in another structure for another batch size")
    found: list[Call] = []
    for a, b in zip(one.calls, many.calls, strict=True):
        if a.operator is not b.operator or a.result != b.result or a.kwargs.keys() != b.kwargs.keys():
            raise Refused("other operators for another batch size")
        kwargs = {name: _merged(value, b.kwargs[name]) for name, value in a.kwargs.items()}
        found.append(Call(a.operator, _merged(a.args, b.args), kwargs, a.result, a.module))
    return found


def _merged(a: Any, b: Any) -> Any:
    """An argument of both recordings, with `_Batches` where they differ by the batch size.

    Raises: Refused where they differ otherwise, or where it is of a kind that is not understood.
    """
    if type(a) is not type(b):
        raise Refused(f"{a} for one sample and {b} for {_MANY}")
    if isinstance(a, (list, tuple)) and len(a) == len(b):  # pyright: ignore
        return type(a)(_merged(x, y) for x, y in zip(a, b, strict=True))  # pyright: ignore
    if isinstance(a, Constant):
        same = a.value is b.value or (_shape(a.value) == _shape(b.value) and torch.equal(a.value, b.value))
    elif isinstance(a, float):
        same = a == b or (math.isnan(a) and math.isnan(b))
    else:
        same = isinstance(a, (int, Ref, *_SIMPLE)) and a == b
    if same:
        return a
    if type(a) is int and b == a * _MANY:
        return _Batches(a)
    raise Refused(f"{a} for one sample and {b} for {_MANY}")


def _shape(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.stride()


class _Graph:
    def __init__(self, model: nn.Module, one: Recording, many: Recording) -> None:
        self._names = lookup.names_of_tensors(model)
        self._types = {path: type(module) for path, module in lookup.named_modules(model).items()}
        self._one, self._many = one, many
        self._graph = fx.Graph()
        # A tensor's node; or the node of a result with several tensors, and its place among them.
        self._nodes: dict[Ref, fx.Node | tuple[Any, int]] = {}
        self._inputs = [self._graph.placeholder(f"x_{number}") for number in range(many.inputs)]
        for slot, node in enumerate(self._inputs):
            self._made(Ref(slot), node)
        self._attributes: dict[str, Tensor] = {}
        self._constants: dict[int, fx.Node] = {}
        self._sizes: dict[int, fx.Node] = {}

    def built(self, calls: list[Call], outputs: list[Any]) -> fx.GraphModule:
        for call in calls:
            self._add(call)
        nodes = self._node(outputs)
        structure = self._many.structure
        if structure == pytree.tree_structure(0):
            self._graph.output(nodes[0])
        else:
            names = [node.name for node in self._inputs]
            given = pytree.tree_structure((tuple(self._inputs), {}))
            self._graph.output(tuple(nodes))
            self._graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, given, structure)))
        return fx.GraphModule(self._attributes, self._graph)

    def _add(self, call: Call) -> None:
        name = call.operator._schema.name.rpartition("::")[2]
        args, kwargs = self._node(call.args), {key: self._node(value) for key, value in call.kwargs.items()}
        node = self._graph.create_node("call_function", call.operator, args, kwargs, name)
        if call.module:
            node.meta["nn_module_stack"] = {call.module: (call.module, self._types[call.module])}
        self._made(call.result, node)

    def _made(self, result: Any, node: fx.Node | tuple[Any, int]) -> None:
        if isinstance(result, Ref):
            self._nodes[result] = node
            if isinstance(node, fx.Node):
                shape, shapes = self._one.shapes[result.slot].shape, self._many.shapes[result.slot]
                if any(many not in (n, n * _MANY) for n, many in zip(shape, shapes.shape, strict=True)):
                    raise Refused(f"sizes {tuple(shape)} for one sample and {tuple(shapes.shape)} for {_MANY}")
                node.meta["val"] = shapes
                node.meta["sizes"] = list(zip(shape, shapes.shape, strict=True))
        elif isinstance(result, list):
            for place, one in enumerate(result):  # pyright: ignore
                self._made(one, (node, place))

    def _node(self, value: Any) -> Any:
        """An argument with nodes for what is not known before the graph runs."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._node(one) for one in value)  # pyright: ignore
        if isinstance(value, Ref):
            found = self._nodes[value]
            if not isinstance(found, fx.Node):
                found = self._item(*found)
                self._made(value, found)
            return found
        if isinstance(value, Constant):
            return self._constant(value.value)
        return self._size(value.factor) if isinstance(value, _Batches) else value

    def _item(self, source: Any, place: int) -> fx.Node:
        source = source if isinstance(source, fx.Node) else self._item(*source)
        return self._graph.call_function(operator.getitem, (source, place))

    def _constant(self, value: Tensor) -> fx.Node:
        if id(value) not in self._constants:
            names = self._names.get(id(value)) or [f"constant_of_forward_{len(self._attributes)}"]
            if names[0] in self._attributes:
                raise Refused(f"another tensor is called {names[0]}")
            self._attributes[names[0]] = value
            node = self._constants[id(value)] = self._graph.get_attr(names[0])
            node.meta["val"] = value
        return self._constants[id(value)]

    def _size(self, factor: int) -> fx.Node:
        if factor not in self._sizes:
            if factor == 1:
                node = self._graph.call_function(_SIZE, (self._inputs[0], 0))
            else:
                node = self._graph.call_function(operator.mul, (self._size(1), factor))
            node.meta["val"] = _MANY * factor
            self._sizes[factor] = node
        return self._sizes[factor]
