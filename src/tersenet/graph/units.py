"""Labels that were merged become units; units that live in the same places become channel groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tersenet.graph.labels import IntArray, Labelling, Table


@dataclass(frozen=True)
class Member:
    """Where a group's channels lie on one end: `places[unit]` are the indices along the end's axis."""

    end: int
    places: IntArray


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can be kept or removed unit by unit, each unit at all its places at once.

    `producers` are the layers whose filters make these channels. `frozen` is the reason why none can be removed.
    `scatter` is the end behind which the channels are put back at full width (residual mode `independent`).
    """

    name: str
    size: int
    units: IntArray
    members: tuple[Member, ...]
    producers: tuple[str, ...]
    frozen: str | None = None
    scatter: int | None = None


@dataclass(frozen=True)
class Units:
    """`of[label]` is the unit of a label; `groups` are in the order of the network."""

    of: IntArray
    groups: tuple[ChannelGroup, ...]


def build_units(found: Labelling) -> Units:
    """Connected components of the merges, then grouping by the set of ends that a component touches."""
    of = _settled(_components(found.merges, found.count), found.tables)
    count = int(of.max()) + 1

    reasons = ["", "it holds no channel of its own"]
    frozen = np.zeros(count, dtype=np.int64)
    frozen[of[0]] = 1
    for labels, reason in found.frozen:
        if reason not in reasons:
            reasons.append(reason)
        places = of[labels]
        frozen[places] = np.where(frozen[places] == 0, reasons.index(reason), frozen[places])

    # Most ends carry the very channels of others, such as a convolution, its batch norm and what reads it.
    known: dict[bytes, IntArray] = {}
    carried = [known.setdefault(units.tobytes(), units) for units in (of[end.labels] for end in found.ends)]
    signature = _signatures(list(known.values()), frozen)
    return Units(of, _groups(found, of, carried, frozen, reasons, signature))


def _components(merges: list[tuple[IntArray, IntArray]], count: int) -> IntArray:
    pairs = merges or [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    links = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(count, count))
    return connected_components(links, directed=False)[1].astype(np.int64)


def _settled(of: IntArray, tables: list[Table]) -> IntArray:
    """Tie what has to go together so that every table stays one: along the axis that leaves most units."""
    for table in tables:
        units = of[table.labels]
        choices = [_along(units, axis) for axis in table.free]
        if not choices:
            choices = [(1, units[(0,) * units.ndim].repeat(units.size), units.reshape(-1))]
        if any(a.size == 0 for _, a, _ in choices):
            continue
        # The last one at equality: channels inside heads, groups and halves.
        _, a, b = max(reversed(choices), key=lambda choice: choice[0])
        of = _components([(a, b)], int(of.max()) + 1)[of]
    return of


def _along(units: IntArray, axis: int) -> tuple[int, IntArray, IntArray]:
    """How many units there are if each lies at one place of `axis`, and what has to be tied for that."""
    rows = np.moveaxis(units, axis, 0).reshape(units.shape[axis], -1)
    first = np.broadcast_to(rows[:, :1], rows.shape)
    differs = rows != first
    a, b = first[differs], rows[differs]
    if a.size == 0:
        return len(np.unique(rows)), a, b
    names, places = np.unique(rows, return_inverse=True)
    places = places.reshape(rows.shape)
    firsts = np.broadcast_to(places[:, :1], rows.shape)
    return int(_components([(firsts[differs], places[differs])], len(names)).max()) + 1, a, b


def _signatures(carried: list[IntArray], frozen: IntArray) -> IntArray:
    """One number per unit, equal for units that touch the same ends equally often and are frozen alike.

    Args: carried: the units along each end; once where two carry the same.
    """
    signature = frozen.copy()
    for along in carried:
        units, times = np.unique(along, return_counts=True)
        _, inverse = np.unique(signature[units] * (times.max() + 1) + times, return_inverse=True)
        signature[units] = signature.max() + 1 + inverse
    return signature


def _groups(
    found: Labelling, of: IntArray, carried: list[IntArray], frozen: IntArray, reasons: list[str], signature: IntArray
) -> tuple[ChannelGroup, ...]:
    """Args: carried: the units along each end, one array for ends that carry the same."""
    keys = {id(along): np.unique(signature[along]).tolist() for along in carried}
    touched: dict[int, list[int]] = {}
    for index, along in enumerate(carried):
        for key in keys[id(along)]:
            touched.setdefault(key, []).append(index)
    groups: list[ChannelGroup] = []
    names: dict[str, int] = {}
    for key, indices in touched.items():
        makers = [i for i in indices if found.ends[i].role == "produce"]
        if not makers:
            continue
        first = carried[makers[0]]
        units = first[signature[first] == key]
        units = units[np.sort(np.unique(units, return_index=True)[1])]
        distinct = {id(carried[i]): carried[i] for i in indices}
        places = {name: _places(along, units) for name, along in distinct.items()}
        members = tuple(Member(i, places[id(carried[i])]) for i in indices)
        reason = reasons[int(frozen[units[0]])]
        scatter = None
        if not reason:
            scatter, reason = _scatter_end(found, first, of, indices)
        name = found.ends[makers[0]].layer
        names[name] = names.get(name, 0) + 1
        groups.append(
            ChannelGroup(
                name=name if names[name] == 1 else f"{name}#{names[name]}",
                size=len(units),
                units=units,
                members=members,
                producers=tuple(dict.fromkeys(found.ends[i].layer for i in makers)),
                frozen=reason or None,
                scatter=scatter,
            )
        )
    order = {id(g): min(m.end for m in g.members if found.ends[m.end].role == "produce") for g in groups}
    return tuple(sorted(groups, key=lambda g: order[id(g)]))


def _places(axis_units: IntArray, units: IntArray) -> IntArray:
    """(units, k) indices along an axis at which each unit lies."""
    order = np.argsort(units)
    found = np.searchsorted(units, axis_units, sorter=order).clip(max=len(units) - 1)
    at = order[found]
    indices = np.flatnonzero(units[at] == axis_units)
    return indices[np.argsort(at[indices], kind="stable")].reshape(len(units), -1)


def _scatter_end(found: Labelling, made: IntArray, of: IntArray, indices: list[int]) -> tuple[int | None, str]:
    """The one end behind which this group's channels return to full width, or why there is no such place."""
    if not found.scatters:
        return None, ""
    units = set(made.tolist())
    ends: set[int] = set()
    for labels, origin, place in found.scatters:
        if units.isdisjoint(of[labels].tolist()):
            continue
        inside = origin & set(indices)
        if any(not np.array_equal(of[labels], of[found.ends[i].labels]) for i in inside):
            return None, f"only a part of it reaches the sum {place}; residual: coupled can prune it"
        if any(name == "normalized_shape" for i in inside for _, name in found.ends[i].attributes):
            return None, f"a layer norm stands before the sum {place}; residual: coupled can prune it"
        if len(inside) != 1:
            return None, f"it reaches the sum {place} by several ways; residual: coupled can prune it"
        ends |= inside
    if not ends:
        return None, ""
    if len(ends) > 1:
        return None, "it reaches several sums by different ways; residual: coupled can prune it"
    end = ends.pop()
    if any(found.ends[i].role == "pass" and end in found.ends[i].fed_by for i in indices):
        return None, "a per-channel layer reads it behind a residual sum; residual: coupled can prune it"
    makers = {i for i in indices if found.ends[i].role == "produce"}
    if not makers <= _upstream(found, end, set(indices)):
        return None, "a layer beside a residual sum is tied to it, such as a gate; residual: coupled can prune it"
    return end, ""


def _upstream(found: Labelling, end: int, members: set[int]) -> set[int]:
    """`end` and the ends of its group through which its channels came."""
    seen: set[int] = set()
    waiting = {end}
    while waiting:
        seen |= waiting
        passed = [found.ends[i].fed_by for i in waiting if found.ends[i].role == "pass"]
        waiting = (frozenset[int]().union(*passed) & members) - seen
    return seen
