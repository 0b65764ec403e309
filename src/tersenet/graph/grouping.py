"""Convolutions made grouped ones: which can be, the weights that go, and the edits, proven to change nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph.convolutions import by_value, listed, tags
from tersenet.graph.edits import Axis, Group, Reorder
from tersenet.graph.labels import End, IntArray
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


def groupable(
    graph: ModelGraph, include: Sequence[str], exclude: Sequence[str] | None
) -> tuple[list[Groupable], dict[str, str]]:
    """The plain Conv2d layers that are included and not excluded, in the network's order; and the other convolutions,
    each with the reason why it stays as it is.

    `exclude` None leaves out the layers that read the network's input. `position:first` and `position:last` are those
    of the plain ones.

    Raises:
        UnknownNameError: a pattern that matches no convolution.
        GraphError: no layer is left.
    """
    convolutions = {e.layer: e for e in graph.ends if e.role == "consume" and not _not_plain(graph, e.layer)}
    known = tags({name: graph.model.get_submodule(name) for name in convolutions})
    names = [name for name, module in graph.model.named_modules() if isinstance(module, nn.Conv2d)]
    if names:
        check_patterns([*include, *(exclude or ())], names)
    left = {name: _not_plain(graph, name) or "it does not run" for name in names if name not in convolutions}
    owners = all_names(graph.model)
    found: list[Groupable] = []
    for name, end in convolutions.items():
        reason = _not_its_own(graph, end, owners.get(f"{name}.weight", []))
        if exclude is None and not end.fed_by:
            reason = "it reads the network's input"
        elif not matches_any(known[name], include) or matches_any(known[name], exclude or ()):
            reason = "it is not included"
        if reason:
            left[name] = reason
            continue
        C_out, C_in = graph.tensor(f"{name}.weight").shape[:2]
        macs = sum(use.macs for use in graph.found.layers if use.name == name) // graph.batch
        found.append(Groupable(name, C_out, C_in, graph.tensor(f"{name}.weight").numel(), macs))
    if not found:
        reasons = "; ".join(f"{listed(layers)}: {why}" for why, layers in by_value(left).items())
        raise GraphError(
            f"no layer is left to group ({reasons or 'the network has no Conv2d'}); see include and exclude"
        )
    return found, left


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


def _not_plain(graph: ModelGraph, layer: str) -> str:
    module = graph.model.get_submodule(layer)
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__name__}"
    if module.groups > 1:
        return "it is grouped already"
    return "" if isinstance(module.weight, nn.Parameter) else "its weights are computed"


def _not_its_own(graph: ModelGraph, end: End, names: list[str]) -> str:
    """Why a layer's weights, which have these names, can't be changed without changing something else."""
    if end.computed:
        return "its weights are computed"
    if any(graph.trace.ops[use].place.module != end.layer for use in end.uses):
        return "its weights are used by other code"
    return "" if len({id(_owner(graph.model, n)) for n in names}) == 1 else "its weights are another layer's too"


def _owner(model: nn.Module, tensor: str) -> nn.Module:
    return model.get_submodule(tensor.rpartition(".")[0])
