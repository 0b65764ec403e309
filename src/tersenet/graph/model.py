"""ModelGraph: a network, what was seen of it, its channel groups, and the edits made to it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.graph import lookup
from tersenet.graph.copies import copied
from tersenet.graph.edits import Edit
from tersenet.graph.labels import End, IntArray, Labeller, Labelling, NDArrayBool, Residual
from tersenet.graph.mend import Fixed
from tersenet.graph.record import InputSpec, Record, attach, record_of
from tersenet.graph.shrink import axis_in
from tersenet.graph.trace import Trace, tensors_in, trace
from tersenet.graph.trial import find_fixed
from tersenet.graph.units import ChannelGroup, Units, build_units
from tersenet.nn.masked import MaskedWeight
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d
from tersenet.nn.winograd_quantizer import FakeQuantizer

Kept = dict[str, IntArray]
"""Group name -> the kept units' places in the group, increasing. Groups that are not named keep everything."""


class ModelGraph:
    """The channel graph of one network.

    Args:
        model: any nn.Module; not changed before `apply`.
        example: the inputs of one forward pass. Their first axis is the batch.
        residual: `coupled` ties all layers that write to one residual trunk; `independent` lets every block keep its
            own channels, which are then added into the full-width trunk at their places.
    """

    def __init__(self, model: nn.Module, example: tuple[Any, ...], residual: Residual = "coupled") -> None:
        self.model = model
        self.example = example
        self.residual: Residual = residual
        self.record = record_of(model) or Record(base=None, input=InputSpec(shape=_shape_of(example)))

    @cached_property
    def trace(self) -> Trace:
        return trace(self.model, self.example)

    @cached_property
    def found(self) -> Labelling:
        """The labels, with everything frozen that has to stay."""
        if self.residual == "coupled":
            return self._coupled[0]
        found = Labeller(self.model, self.trace, self.residual).run()
        self._freeze_swapped(found)
        for op, reason in self.fixed.stuck.items():
            found.freeze_around(self.trace.ops[op], reason)
        return found

    @property
    def fixed(self) -> Fixed:
        """Sizes that are numbers in the network's code: attributes that have to shrink, and what can't."""
        return self._coupled[1]

    @cached_property
    def _coupled(self) -> tuple[Labelling, Fixed]:
        found = Labeller(self.model, self.trace, "coupled").run()
        self._freeze_swapped(found)
        return found, find_fixed(self.model, self.example, self.trace, found)

    def _freeze_swapped(self, found: Labelling) -> None:
        """Everything, where scales of a quantizer or weights of a Winograd domain would have to be cut too."""
        layer = next(
            (name for name, module in lookup.named_modules(self.model).items() if _holds_channels(module)), None
        )
        if layer is not None:
            reason = (
                f"{layer} has weights of the Winograd domain, masks, or scales per channel: prune before the "
                "convolutions are swapped"
            )
            for op in self.trace.ops:
                found.freeze_around(op, reason)

    @cached_property
    def units(self) -> Units:
        known = self.fixed.units if self.residual == "coupled" else None
        return known or build_units(self.found)

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        return self.units.groups

    @property
    def ends(self) -> list[End]:
        return self.found.ends

    @property
    def batch(self) -> int:
        first = self.example[0]
        return int(first.shape[0]) if isinstance(first, Tensor) else len(first)

    def group(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        raise GraphError(f"no channel group {name!r}; the groups are {', '.join(g.name for g in self.groups)}")

    def with_residual(self, residual: Residual) -> ModelGraph:
        """The same network seen in another residual mode."""
        return self if residual == self.residual else ModelGraph(self.model, self.example, residual)

    def copy(self, shared: Iterable[Tensor] = ()) -> ModelGraph:
        """A graph on a deep copy of the model: what is done to it leaves this one alone.

        Args:
            shared: tensors that need no copy, because nothing will be written into them. Edits put new ones in place.

        Raises:
            GraphError: a model that holds what can't be copied.
        """
        return ModelGraph(copied(self.model, shared), self.example, self.residual)

    def apply(self, edit: Edit) -> None:
        """Change the network, and write it down. What was traced before is forgotten.

        Raises:
            GraphError: the edit does not fit this network.
        """
        edit.replay(self.model)
        self.record = self.record.model_copy(update={"edits": (*self.record.edits, edit)})
        attach(self.model, self.record)
        for name in ("trace", "found", "_coupled", "units"):
            self.__dict__.pop(name, None)

    def removed(self, kept: Kept) -> NDArrayBool:
        """Per unit: is it removed?

        Raises:
            GraphError: a frozen group, nothing kept, or an index out of range.
        """
        gone = np.zeros(int(self.units.of.max()) + 1, dtype=bool)
        for name, places in kept.items():
            group = self.group(name)
            if len(places) == group.size:
                continue
            if group.frozen:
                raise GraphError(f"channels of {name} can't be removed: {group.frozen}")
            if len(places) == 0 or places[0] < 0 or places[-1] >= group.size:
                raise GraphError(f"{name}: keep at least one of its {group.size} channels, by their numbers")
            gone[np.delete(group.units, places)] = True
        return gone

    def macs(self, kept: Kept | None = None) -> int:
        """Multiply-adds per sample of conv and linear layers, as they would be with only `kept`."""
        return round(self.macs_of((~self.removed(kept or {})).astype(np.float64)))

    def macs_of(self, shares: NDArray[np.float64]) -> float:
        """The same for a share (0..1) of every unit: papers count with fractional channels."""
        total = 0.0
        for layer in self.found.layers:
            macs = float(layer.macs // self.batch)
            for labels in layer.scales:
                macs *= shares[self.units.of[labels]].mean()
            total += macs
        return total

    def params(self, kept: Kept | None = None) -> int:
        """Parameters as they would be with only `kept`."""
        gone = self.removed(kept or {})
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        for end in self.ends:
            count = int((~gone[self.units.of[end.labels]]).sum())
            for name in end.tensors:
                if name in shapes:
                    shapes[name][axis_in(end, len(shapes[name]))] = count
        return sum(int(np.prod(shape)) for shape in shapes.values())

    def filters(self, group: ChannelGroup) -> list[tuple[Tensor, int, IntArray]]:
        """The weights that make a group's channels: (tensor, output axis, places (units, k) along it)."""
        found: list[tuple[Tensor, int, IntArray]] = []
        for member in group.members:
            end = self.ends[member.end]
            if end.role == "produce":
                found.append((self.tensor(end.tensors[0]), end.axis, member.places))
        return found

    def alive(self, group: ChannelGroup) -> Tensor:
        """(size,) bool, on the CPU: whether any weight of the filters that make a unit is not zero."""
        alive = torch.zeros(group.size, dtype=torch.bool)
        for weight, axis, places in self.filters(group):
            filters = weight.detach().movedim(axis, 0).flatten(1).ne(0).any(1).cpu()
            alive |= filters[torch.from_numpy(places)].any(1)
        return alive

    def tensor(self, name: str) -> Tensor:
        return lookup.tensor(self.model, name)

    def frozen_groups(self) -> dict[str, str]:
        """Group name -> why it can't be pruned."""
        return {g.name: g.frozen for g in self.groups if g.frozen}


def _holds_channels(module: nn.Module) -> bool:
    """Whether a swapped layer has tensors with channels that labels don't know."""
    if isinstance(module, MaskedWeight):
        return True
    # (t t, groups, 1, C) in the Winograd domain, (C, 1, 1, 1) of a weight.
    quantized = isinstance(module, (WinogradConv2d, QuantizedConv2d))
    quantizers = module.quantizers.children() if quantized else ()
    return any(isinstance(q, FakeQuantizer) and _per_channel(q) for q in quantizers)


def _per_channel(quantizer: FakeQuantizer) -> bool:
    return quantizer.settings.per in ("channel", "tap_channel")


def _shape_of(example: tuple[Any, ...]) -> tuple[int, ...]:
    """Of one sample: the first tensor without its batch axis, or the first image of a list."""
    first = tensors_in(example)[0]
    return tuple(first.shape[1:] if isinstance(example[0], Tensor) else first.shape)
