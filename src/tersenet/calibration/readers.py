"""The layers that read channels and can be fitted anew, and what stands behind them: a batch norm, a residual sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.graph.labels import IntArray, NDArrayBool
from tersenet.graph.model import ModelGraph
from tersenet.graph.trace import Op, Ref, refs_in

WIDEST = 8192
"""Inputs of one output above which a layer is not fitted: its second moments alone would take more than 512 MiB."""


@dataclass(frozen=True)
class Reader:
    """A convolution (1d, 2d) or linear layer of a network.

    `end` is the number of its consuming end; `uses` are its operators in the trace. `norm` is the batch norm that alone
    reads what it makes, with its operator. `sum` is the operator that adds something of the same shape to its result,
    behind the norm if there is one, with the place of that other operand.
    """

    end: int
    layer: str
    uses: tuple[int, ...]
    groups: int
    norm: tuple[str, int] | None = None
    sum: tuple[int, int] | None = None

    @property
    def last(self) -> int:
        """The last operator that has to run for its statistics."""
        return self.sum[0] if self.sum is not None else max(self.uses)


def find_readers(graph: ModelGraph) -> tuple[list[Reader], dict[int, str]]:
    """All that can be fitted, in the order in which they run, and for the other consuming ends the reason."""
    found: list[Reader] = []
    others: dict[int, str] = {}
    for index, end in enumerate(graph.ends):
        if end.role != "consume":
            continue
        module = graph.model.get_submodule(end.layer) if end.tensors else None
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)) or end.computed or end.reads is None:
            others[index] = "it is no convolution or linear layer with weights of its own"
        elif not isinstance(module.weight, nn.Parameter) or end.tensors != (f"{end.layer}.weight",):
            others[index] = "its weights are computed"
        elif {graph.trace.ops[use].name for use in end.uses} - {"convolution", "addmm", "mm"}:
            others[index] = "it runs as an operator that is not looked at"
        elif module.weight[0].numel() > WIDEST:
            others[index] = f"each of its outputs reads {module.weight[0].numel():,} values, more than {WIDEST:,}"
        else:
            groups = 1 if isinstance(module, nn.Linear) else module.groups
            norm, total = _behind(graph, end.uses) if not isinstance(module, nn.Linear) else (None, None)
            found.append(Reader(index, end.layer, tuple(end.uses), groups, norm, total))
    return sorted(found, key=lambda reader: min(reader.uses)), others


def _behind(graph: ModelGraph, uses: list[int]) -> tuple[tuple[str, int] | None, tuple[int, int] | None]:
    trace = graph.trace
    if len(uses) != 1:
        return None, None
    result = trace.ops[uses[0]].result
    norm, reader = None, next_operator(graph, result)
    if reader is not None and reader.name == "native_batch_norm" and not reader.args[5] and reader.args[0] == result:
        mean = reader.args[3]
        name = trace.slots[mean.slot].parameter if isinstance(mean, Ref) else None
        if name is not None and len(trace.readers[mean]) == 1:
            norm = (name.rpartition(".")[0], reader.number)
            result = reader.result[0]
            reader = next_operator(graph, result)
    if reader is None or reader.name != "add" or not all(isinstance(a, Ref) for a in reader.args[:2]):
        return norm, None
    place = 1 if reader.args[0] == result else 0
    shapes = {trace.slots[a.slot].shape for a in reader.args[:2]}
    same = reader.args[0] == reader.args[1] or len(shapes) > 1 or reader.kwargs.get("alpha", 1) != 1
    return norm, None if same else (reader.number, place)


def next_operator(graph: ModelGraph, result: Ref) -> Op | None:
    """The operator that alone reads a tensor: the first, where it works in place and others see what it made of it."""
    readers = graph.trace.readers.get(result, [])
    if not readers or (readers[0].result != result and (len(readers) > 1 or result in refs_in(graph.trace.outputs))):
        return None
    return readers[0]


def units_read(graph: ModelGraph, reader: Reader) -> IntArray:
    """(groups, inputs of one group): the unit of every channel (of a linear layer: of every value) that it reads."""
    reads = graph.ends[reader.end].reads
    assert reads is not None
    return graph.units.of[reads].reshape(reader.groups, -1)


def outputs_left(graph: ModelGraph, reader: Reader, gone: NDArrayBool) -> Tensor:
    """(outputs,) bool: the channels that it makes and that are not removed."""
    name = graph.ends[reader.end].tensors[0]
    made = next(e for e in graph.ends if e.role == "produce" and e.layer == reader.layer and e.tensors[0] == name)
    return torch.from_numpy(~gone[graph.units.of[made.labels]])


def owners(units: IntArray, wanted: IntArray) -> Tensor:
    """Of each of `units` its place in `wanted`, -1 for those that are not there."""
    order = np.argsort(wanted)
    at = order[np.searchsorted(wanted, units, sorter=order).clip(max=len(wanted) - 1)]
    return torch.from_numpy(np.where(wanted[at] == units, at, -1))


def through_norm(model: nn.Module, reader: Reader) -> tuple[Tensor, Tensor] | None:
    """(scale, shift), float64 (outputs,), of the batch norm behind a reader; None where there is none."""
    if reader.norm is None:
        return None
    norm = model.get_submodule(reader.norm[0])
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]
    assert norm.running_var is not None
    assert norm.running_mean is not None
    # They are None without `affine`, whatever their annotation says.
    weight, bias = dict(norm.named_parameters()).get("weight"), dict(norm.named_parameters()).get("bias")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if weight is None else scale * weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if bias is None else shift + bias.detach().double()
