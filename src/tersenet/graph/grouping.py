"""Convolutions made grouped ones: which can be, the weights that go, and the edits, proven to change nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from tersenet.ops.assignment import inverse
from tersenet.ops.channel_order import Order, Side, Tie
from tersenet.ops.group_levels import relationship_matrix
from tersenet.results import Equality

_SIDES: dict[str, Side] = {"produce": "rows", "consume": "columns"}


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


def trunk_ties(graph: ModelGraph, layers: Collection[str]) -> list[Tie]:
    """The sides of `layers` that would need no gather if they had one order: those on a residual trunk, and those of
    several layers that read what none of them makes. Only where the network's channels can be put in another order.

    A layer that reads the trunk that it writes to is tied by what it writes.
    """
    ties: list[Tie] = []
    for group in graph.groups:
        if not _can_be_reordered(graph, group):
            continue
        sides: dict[str, Side] = {}
        for layer, side in _whole_sides(graph, group, layers):
            sides.setdefault(layer, side)
        if len(sides) > 1 and (len(group.producers) > 1 or "rows" not in sides.values()):
            ties.append(tuple(sides.items()))
    return ties


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
    moved: dict[tuple[tuple[str, ...], int], IntArray] = {}
    for group_name, order in orders.items():
        for member in graph.group(group_name).members:
            end, places = graph.ends[member.end], member.places[:, 0]
            for tensor in end.tensors:
                at = tuple(names[tensor]), axis_in(end, graph.tensor(tensor).dim())
                # Of a concatenation, a group has some of the places, and other groups the others.
                moved.setdefault(at, np.arange(len(end.labels)))[places] = places[order]
    edits: dict[bytes, Reorder] = {}
    for (tensors, axis), order in moved.items():
        known = edits.get(order.tobytes())
        axes = (*(known.axes if known else ()), Axis(tensors=tensors, axis=axis))
        group = known.group if known else tensors[0].rpartition(".")[0]
        edits[order.tobytes()] = Reorder(group=group, order=tuple(order.tolist()), axes=axes)

    def placed(name: str, channels: IntArray, axis: int) -> IntArray:
        order = moved.get((tuple(names[f"{name}.weight"]), axis))
        return channels if order is None else inverse(order)[channels]

    after = {
        name: Grouping(g.groups, Order(placed(name, g.order.rows, 0), placed(name, g.order.columns, 1)))
        for name, g in groupings.items()
    }
    return list(edits.values()), after


def _common_orders(graph: ModelGraph, groupings: Mapping[str, Grouping]) -> dict[str, IntArray]:
    """Channel group -> the order of the first grouped layer that makes it, or else of the first that reads it."""
    found: dict[str, IntArray] = {}
    for group in graph.groups:
        if not _can_be_reordered(graph, group):
            continue
        sides = _whole_sides(graph, group, groupings)
        known = [getattr(groupings[layer].order, side) for layer, side in sides]
        if known and not np.array_equal(known[0], np.arange(group.size)):
            found[group.name] = known[0]
    return found


def _can_be_reordered(graph: ModelGraph, group: ChannelGroup) -> bool:
    """Whether each channel has one place wherever it is, and every tensor there has all places of its end."""
    if group.frozen is not None or any(member.places.shape[1] != 1 for member in group.members):
        return False
    ends = (graph.ends[member.end] for member in group.members)
    tensors = ((end, graph.tensor(name)) for end in ends for name in end.tensors)
    return all(tensor.shape[axis_in(end, tensor.dim())] == len(end.labels) for end, tensor in tensors)


def _whole_sides(graph: ModelGraph, group: ChannelGroup, layers: Collection[str]) -> list[tuple[str, Side]]:
    """The sides of `layers` that hold these channels, in this order and no others; first those that make them."""
    found: list[tuple[str, Side]] = []
    for role, side in _SIDES.items():
        for member in group.members:
            end = graph.ends[member.end]
            whole = len(end.labels) == group.size and np.array_equal(member.places[:, 0], np.arange(group.size))
            if end.role == role and end.layer in layers and whole:
                found.append((end.layer, side))
    return list(dict.fromkeys(found))


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
