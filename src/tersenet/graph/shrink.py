"""The edits that keep some channels: which tensor axes are cut where, and which sizes shrink with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from tersenet.graph import lookup
from tersenet.graph.edits import Attribute, Keep, Resize, Slice
from tersenet.graph.labels import End, IntArray, Labelling, NDArrayBool
from tersenet.graph.mend import Mend, Sizes, values
from tersenet.graph.trace import Trace
from tersenet.graph.units import ChannelGroup, Units


def cuts(
    model: nn.Module, trace: Trace, found: Labelling, units: Units, mends: Sequence[Mend], gone: NDArrayBool
) -> list[Keep | Resize]:
    """One `Keep` for every group that loses units, and one `Resize` for the numbers in the network's code."""
    groups = [g for g in units.groups if gone[g.units].any()]
    names = all_names(model)
    sliced = np.zeros_like(gone)
    sizes: dict[tuple[str, str], Any] = {}
    edits: list[Keep | Resize] = []
    for group in groups:
        edits.append(_keep(model, group, found.ends, units.of, gone, sliced, sizes, names))
        sliced[group.units] = gone[group.units]
    new = values(list(mends), model, trace, Sizes(trace, found, gone[units.of]))
    modules = dict(model.named_modules())
    changed = [
        Attribute(module=module, name=name, value=value)
        for (module, name), value in new.items()
        if _plain(vars(modules[module])[name]) != value
    ]
    return [*edits, Resize(attributes=tuple(changed))] if changed else edits


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _keep(
    model: nn.Module,
    group: ChannelGroup,
    ends: list[End],
    of: IntArray,
    gone: NDArrayBool,
    sliced: NDArrayBool,
    sizes: dict[tuple[str, str], Any],
    names: dict[str, list[str]],
) -> Keep:
    """The slices of one group. Ends that several groups share are sliced group by group, each by what is left."""
    slices: list[Slice] = []
    attributes: list[Attribute] = []
    done: set[tuple[str, int]] = set()
    set_here: set[tuple[str, str]] = set()
    for member in group.members:
        end = ends[member.end]
        units = of[end.labels]
        left = units[~sliced[units]]
        keep = tuple(np.flatnonzero(~(gone[left] & np.isin(left, group.units))).tolist())
        if len(keep) == len(left):
            continue
        for name in end.tensors:
            axis = axis_in(end, lookup.tensor(model, name).dim())
            if (name, axis) not in done:
                done.add((name, axis))
                # Made here and not read from a file, so that nothing needs to be checked.
                slices.append(Slice.model_construct(tensors=tuple(names[name]), axis=axis, keep=keep))
        for module, name in [a for a in end.attributes if a not in set_here]:
            set_here.add((module, name))
            old = sizes.get((module, name), vars(lookup.submodule(model, module)).get(name))
            new = _scaled(old, len(keep), len(left))
            if new is not None:
                sizes[module, name] = new
                attributes.append(Attribute.model_construct(module=module, name=name, value=new))
    return Keep.model_construct(group=group.name, slices=tuple(slices), attributes=tuple(attributes))


def all_names(model: nn.Module) -> dict[str, list[str]]:
    """The first name of every parameter and buffer -> all its names: a tensor may have several owners."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, tensor in [*module.named_parameters(path, False), *module.named_buffers(path, False)]:
            names.setdefault(id(tensor), []).append(name)
    return {group[0]: group for group in names.values()}


def _scaled(old: Any, keep: int, left: int) -> Any:
    if isinstance(old, (tuple, list)) and old and all(isinstance(v, int) for v in old):
        return (*old[:-1], old[-1] * keep // left)
    return old * keep // left if isinstance(old, int) and not isinstance(old, bool) else None


def axis_in(end: End, dims: int) -> int:
    """The axis in one of its tensors: a transposed convolution's weight makes channels on axis 1, its bias on 0."""
    return end.axis if end.axis < dims else 0
