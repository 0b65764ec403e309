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
    cutter = _Cutter(model, found.ends, units.of, gone)
    edits: list[Keep | Resize] = [cutter.keep(group) for group in groups]
    new = values(list(mends), model, trace, Sizes(trace, found, gone[units.of])) if mends else {}
    changed = [
        Attribute(module=module, name=name, value=value)
        for (module, name), value in new.items()
        if _plain(vars(lookup.submodule(model, module))[name]) != value
    ]
    return [*edits, Resize(attributes=tuple(changed))] if changed else edits


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class _Cutter:
    """Makes the slices of one group after another. Ends that several groups share are sliced group by group, each by
    what is left."""

    def __init__(self, model: nn.Module, ends: list[End], of: IntArray, gone: NDArrayBool) -> None:
        self.model, self.ends, self.of, self.gone = model, ends, of, gone
        self._names = all_names(model)
        self._sliced, self._going = np.zeros_like(gone), np.zeros_like(gone)
        self._sizes: dict[tuple[str, str], Any] = {}
        # One object for equal indices, so that they are turned into a tensor only once.
        self._known: dict[bytes, tuple[int, ...]] = {}

    def keep(self, group: ChannelGroup) -> Keep:
        slices: list[Slice] = []
        attributes: list[Attribute] = []
        done: set[tuple[str, int]] = set()
        set_here: set[tuple[str, str]] = set()
        self._going[group.units] = self.gone[group.units]
        for member in group.members:
            end = self.ends[member.end]
            units = self.of[end.labels]
            left = units[~self._sliced[units]]
            keep = self._indices(~self._going[left])
            if len(keep) == len(left):
                continue
            for name in end.tensors:
                axis = axis_in(end, lookup.tensor(self.model, name).dim())
                if (name, axis) not in done:
                    done.add((name, axis))
                    # Made here and not read from a file, so that nothing needs to be checked.
                    slices.append(Slice.model_construct(tensors=tuple(self._names[name]), axis=axis, keep=keep))
            for module, name in [a for a in end.attributes if a not in set_here]:
                set_here.add((module, name))
                old = self._sizes.get((module, name), vars(lookup.submodule(self.model, module)).get(name))
                new = _scaled(old, len(keep), len(left))
                if new is not None:
                    self._sizes[module, name] = new
                    attributes.append(Attribute.model_construct(module=module, name=name, value=new))
        self._sliced |= self._going
        self._going[group.units] = False
        return Keep.model_construct(group=group.name, slices=tuple(slices), attributes=tuple(attributes))

    def _indices(self, stays: NDArrayBool) -> tuple[int, ...]:
        key = stays.tobytes()
        if key not in self._known:
            self._known[key] = tuple(np.flatnonzero(stays).tolist())
        return self._known[key]


def all_names(model: nn.Module) -> dict[str, list[str]]:
    """The first name of every parameter and buffer -> all its names: a tensor may have several owners."""
    return {names[0]: names for names in lookup.names_of_tensors(model).values()}


def shares_weight(model: nn.Module, layer: str) -> bool:
    """Whether another layer has the very weight of this one."""
    names = next((names for names in all_names(model).values() if f"{layer}.weight" in names), [])
    return len({name.rpartition(".")[0] for name in names}) > 1


def _scaled(old: Any, keep: int, left: int) -> Any:
    if isinstance(old, (tuple, list)) and old and all(isinstance(v, int) for v in old):
        return (*old[:-1], old[-1] * keep // left)
    return old * keep // left if isinstance(old, int) and not isinstance(old, bool) else None


def axis_in(end: End, dims: int) -> int:
    """The axis in one of its tensors: a transposed convolution's weight makes channels on axis 1, its bias on 0."""
    return end.axis if end.axis < dims else 0
