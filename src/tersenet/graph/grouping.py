"""Convolutions made grouped ones: which can be, the weights that go, and the edits, proven to change nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph.convolutions import tags
from tersenet.graph.edits import Axis, Group, Reorder
from tersenet.graph.labels import IntArray
from tersenet.graph.model import ModelGraph
from tersenet.graph.proof import compare
from tersenet.graph.select import check_patterns, matches_any
from tersenet.graph.shrink import all_names, axis_in
from tersenet.graph.undo import structure_of
from tersenet.graph.units import ChannelGroup
from tersenet.ops.channel_order import Order, inverse
from tersenet.ops.group_levels import relationship_matrix
from tersenet.results import Equality


@dataclass(frozen=True)
class Groupable:
    """A convolution that could be grouped. `params` are its weights without bias, `macs` those of one sample."""

    name: str
    C_out: int
    C_in: int
    params: int
    macs: int

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Grouping:
    """`groups` equal blocks of a convolution's channels in this order."""

    groups: int
    order: Order


def groupable(graph: ModelGraph, include: Sequence[str], exclude: Sequence[str] | None) -> list[Groupable]:
    """The plain Conv2d layers that are included and not excluded, in the network's order.

    `exclude` None leaves out the layers that read the network's input. Layers that can't be grouped are left out too:
    already grouped ones, and those whose weights are computed, shared with another layer, or used by other code.
    `position:first` and `position:last` are those of the plain ones.

    Raises:
        UnknownNameError: a pattern that matches no convolution.
        GraphError: no layer is left.
    """
    convolutions = {e.layer: e for e in graph.ends if e.role == "consume" and _is_plain(graph, e.layer)}
    known = tags({name: graph.model.get_submodule(name) for name in convolutions})
    names = [name for name, module in graph.model.named_modules() if isinstance(module, nn.Conv2d)]
    if names:
        check_patterns([*include, *(exclude or ())], names)
    owners = all_names(graph.model)
    found: list[Groupable] = []
    for name, end in convolutions.items():
        out = not end.fed_by if exclude is None else matches_any(known[name], exclude)
        alone = all(graph.trace.ops[use].place.module == name for use in end.uses)
        shared = len({id(_owner(graph.model, n)) for n in owners.get(f"{name}.weight", ())}) != 1
        if out or not matches_any(known[name], include) or end.computed or not alone or shared:
            continue
        C_out, C_in = graph.tensor(f"{name}.weight").shape[:2]
        macs = sum(use.macs for use in graph.found.layers if use.name == name) // graph.batch
        found.append(Groupable(name, C_out, C_in, graph.tensor(f"{name}.weight").numel(), macs))
    if not found:
        raise GraphError(
            "no layer is left to group: include and exclude leave no plain Conv2d with weights of its own (the layers "
            "that read the network's input are left out by default)"
        )
    return found


def kernel_norms(weight: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(C_out, C_in, kH, kW) -> (C_out, C_in): the l1 norm of every kernel, in float64."""
    return weight.detach().abs().flatten(2).sum(2, dtype=torch.float64).cpu().numpy()


@torch.no_grad()
def mask_groups(graph: ModelGraph, groupings: Mapping[str, Grouping]) -> None:
    """Set the weights outside every layer's blocks to zero."""
    for name, grouping in groupings.items():
        weight = graph.tensor(f"{name}.weight")
        inside = relationship_matrix(weight.shape[0], weight.shape[1], grouping.groups)
        outside = torch.from_numpy(~grouping.order.back(inside)).to(weight.device)
        weight.masked_fill_(outside[:, :, None, None], 0)


def group_convolutions(graph: ModelGraph, groupings: Mapping[str, Grouping], fuse: bool = True) -> Equality:
    """Replace masked convolutions by grouped ones. Layers with one group are left alone.

    Args:
        fuse: put the channels between layers in an order that one of them wants, as far as the network allows: one
            gather remains between two grouped convolutions, and none before an ordinary layer.

    Raises:
        GraphError: the grouped network would not equal the masked one. Nothing is changed then.
    """
    groupings = {name: grouping for name, grouping in groupings.items() if grouping.groups > 1}
    masked = graph.copy().model
    if fuse:
        orders = _common_orders(graph, groupings)
        try:
            return _carry_out(graph, masked, groupings, orders)
        except GraphError:
            # Something between the layers depends on the channels' order: then every layer puts them back itself.
            if not orders:
                raise
    return _carry_out(graph, masked, groupings, {})


def _carry_out(
    graph: ModelGraph, masked: nn.Module, groupings: Mapping[str, Grouping], orders: Mapping[str, IntArray]
) -> Equality:
    restore, known = structure_of(graph.model), dict(graph.__dict__)
    edits, placed = _edits(graph, groupings, orders)
    try:
        for edit in edits:
            graph.apply(edit)
        for name, grouping in placed.items():
            rows, columns = tuple(grouping.order.rows.tolist()), tuple(grouping.order.columns.tolist())
            graph.apply(Group(module=name, groups=grouping.groups, rows=rows, columns=columns))
        equality = compare(masked, graph.model, graph.example)
        if not equality.relative <= equality.tolerance:
            raise GraphError(
                f"the grouped network differs from the masked one by {equality.relative:.2g} of the largest output "
                f"(allowed {equality.tolerance:.0e}); nothing was changed. Leave layers out (exclude)"
            )
    except BaseException:
        restore()
        graph.__dict__.clear()
        graph.__dict__.update(known)
        raise
    return equality


def _edits(
    graph: ModelGraph, groupings: Mapping[str, Grouping], orders: Mapping[str, IntArray]
) -> tuple[list[Reorder], dict[str, Grouping]]:
    """The groups' new orders as edits, and the groupings as they are after them."""
    names = all_names(graph.model)
    rows = {name: grouping.order.rows for name, grouping in groupings.items()}
    columns = {name: grouping.order.columns for name, grouping in groupings.items()}
    edits: list[Reorder] = []
    for group_name, order in orders.items():
        group = graph.group(group_name)
        axes: dict[tuple[str, int], Axis] = {}
        for end in (graph.ends[member.end] for member in group.members):
            for tensor in end.tensors:
                axis = axis_in(end, graph.tensor(tensor).dim())
                axes[tensor, axis] = Axis(tensors=tuple(names[tensor]), axis=axis)
            side = {"produce": rows, "consume": columns}.get(end.role, {})
            if end.layer in side:
                side[end.layer] = inverse(order)[side[end.layer]]
        edits.append(Reorder(group=group_name, order=tuple(order.tolist()), axes=tuple(axes.values())))
    return edits, {n: Grouping(g.groups, Order(rows[n], columns[n])) for n, g in groupings.items()}


def _common_orders(graph: ModelGraph, groupings: Mapping[str, Grouping]) -> dict[str, IntArray]:
    """Channel group -> the order of the first grouped layer that makes it, or else of the first that reads it."""
    found: dict[str, IntArray] = {}
    for group in graph.groups:
        if group.frozen is not None or not _can_be_reordered(graph, group):
            continue
        ends = [graph.ends[member.end] for member in group.members]
        made = [groupings[e.layer].order.rows for e in ends if e.role == "produce" and e.layer in groupings]
        read = [groupings[e.layer].order.columns for e in ends if e.role == "consume" and e.layer in groupings]
        order = next(iter([*made, *read]), None)
        if order is not None and not np.array_equal(order, np.arange(group.size)):
            found[group.name] = order
    return found


def _can_be_reordered(graph: ModelGraph, group: ChannelGroup) -> bool:
    """Whether the channels lie in the same order, and nothing else beside them, wherever they are."""
    in_order = np.arange(group.size)[:, None]
    return all(
        len(graph.ends[member.end].labels) == group.size and np.array_equal(member.places, in_order)
        for member in group.members
    )


def _is_plain(graph: ModelGraph, layer: str) -> bool:
    module = graph.model.get_submodule(layer)
    return type(module) is nn.Conv2d and module.groups == 1 and isinstance(module.weight, nn.Parameter)


def _owner(model: nn.Module, tensor: str) -> nn.Module:
    return model.get_submodule(tensor.rpartition(".")[0])
