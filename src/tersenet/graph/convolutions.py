"""The convolutions of a network as Winograd's algorithm sees them: which can be swapped, and what that saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tersenet.graph.edits import Quantize, Winograd
from tersenet.graph.model import ModelGraph
from tersenet.graph.select import POSITIONS
from tersenet.graph.trace import evaluating
from tersenet.nn.group_shuffle import GroupShuffleConv2d
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d
from tersenet.nn.winograd_quantizer import directly
from tersenet.ops.winograd_tiles import Geometry

_T = TypeVar("_T")


@dataclass(frozen=True)
class Convolution:
    """A convolution that ran. `outputs` is the shape (N, C, H, W) of its largest output, by which its tile is chosen;
    `others` are those of further passes, such as of a head that runs on every map of a pyramid."""

    name: str
    module: nn.Conv2d
    outputs: tuple[int, ...]
    others: tuple[tuple[int, ...], ...] = ()

    @property
    def taps(self) -> int:
        """r of F(m, r): of a stride of 2, each phase has half of the filter."""
        return self._geometry(1).taps

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of the map that tiles are cut from: of a dilation, each phase's."""
        return self._sides(self.outputs)

    def multiplications(self, tile: int | None = None) -> int:
        """Products per image in all passes: of F(tile, r), tiles beyond the map's border included; None is the direct
        convolution."""
        conv = self.module
        channels = conv.in_channels // conv.groups * conv.out_channels
        maps = (self.outputs, *self.others)
        if tile is None:
            return sum(prod(outputs[2:]) for outputs in maps) * prod(conv.kernel_size) * channels
        strides = prod(self._geometry(tile).axis(axis)[1] for axis in (0, 1))
        tiles = sum(
            prod(d * -(-side // tile) for side, d in zip(self._sides(outputs), self._phases, strict=True))
            for outputs in maps
        )
        return tiles * (tile + self.taps - 1) ** 2 * strides * channels

    def _sides(self, outputs: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-size // d) for size, d in zip(outputs[2:], self._phases, strict=True))

    def hindrance(self, strided: bool) -> str | None:
        """Why it can't, or should not, be a Winograd layer; None if it can."""
        conv = self.module
        kernel = "x".join(map(str, conv.kernel_size))
        if conv.kernel_size[0] != conv.kernel_size[1]:
            return f"its kernel {kernel} is not square"
        if conv.kernel_size[0] == 1:
            return "1x1: there is nothing to save"
        if conv.kernel_size[0] > 7:
            return f"its kernel {kernel} is above 7x7: the transforms would lose too many digits"
        if conv.groups > 1 and conv.groups == conv.in_channels:
            return "depthwise: the transforms would cost more than they save"
        if max(conv.stride) > 1 and not strided:
            return "strided: only 1.4 times fewer products for 3x3 (`strided: true` takes it)"
        if self.taps == 1:
            return "its stride leaves one tap to each phase: there is nothing to save"
        if min(self.sides) < 2:
            return f"its map is {self.outputs[2]}x{self.outputs[3]}: no tile fits"
        return None

    @property
    def _phases(self) -> tuple[int, int]:
        """Those of the dilation, which are images of their own; a stride takes its share of it."""
        geometry = self._geometry(1)
        return geometry.axis(0)[2], geometry.axis(1)[2]

    def _geometry(self, tile: int) -> Geometry:
        conv = self.module
        kernel, stride, dilation = ((v[0], v[1]) for v in (conv.kernel_size, conv.stride, conv.dilation))
        return Geometry(tile, kernel, stride, dilation=dilation, groups=conv.groups)


def convolutions(graph: ModelGraph, *, grouped: bool = False) -> tuple[list[Convolution], dict[str, str]]:
    """The plain convolutions, in the order in which they run; and those that stay out of it, with the reason.

    grouped: with those that structured sparsification made groups of.
    """
    found: dict[str, Convolution] = {}
    left: dict[str, str] = {}

    def see(name: str, module: nn.Conv2d) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            before = found.get(name)
            passes = [tuple(output.shape)] if before is None else [before.outputs, *before.others, tuple(output.shape)]
            largest = max(passes, key=prod)
            passes.remove(largest)
            found[name] = Convolution(name, module, largest, tuple(passes))

        return module.register_forward_hook(hook)

    handles: list[Any] = []
    named = {name: m for name, m in graph.model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, module in named.items():
        reason = None if grouped and type(module) is GroupShuffleConv2d else _not_plain(name, module)
        if reason is None:
            handles.append(see(name, module))
        else:
            left[name] = reason
    try:
        with torch.no_grad(), directly(), evaluating(graph.model):
            graph.model(*graph.example)
    finally:
        for handle in handles:
            handle.remove()
    left |= {name: "it does not run" for name in named if name not in found and name not in left}
    for name in [name for name, conv in found.items() if len(conv.outputs) != 4]:
        found.pop(name)
        left[name] = "it has no batch axis"
    return list(found.values()), left


def tags(layers: Mapping[str, nn.Module]) -> dict[str, frozenset[str]]:
    """What patterns can match, for convolutions in the order in which they run: the name, `type:conv`, `type:grouped`
    or `type:depthwise`, and `position:first` and `position:last` of them."""
    names = list(layers)
    ends = dict(zip(POSITIONS, (names[:1], names[-1:]), strict=True))
    return {
        name: frozenset({name, _type(layer), *(tag for tag, at in ends.items() if name in at)})
        for name, layer in layers.items()
    }


def _type(layer: nn.Module) -> str:
    if not isinstance(layer, nn.Conv2d) or layer.groups == 1:
        return "type:conv"
    return "type:depthwise" if layer.groups == layer.in_channels else "type:grouped"


def _not_plain(name: str, module: nn.Conv2d) -> str | None:
    if isinstance(module, (WinogradConv2d, QuantizedConv2d)):
        return "it is a Winograd or quantized layer already"
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__name__}, which computes in a way of its own"
    if has_hooks(module):
        return "it has hooks, such as the older weight_norm's"
    return None if name else "it is the whole network"


def has_hooks(module: nn.Module) -> bool:
    """Whether a user's hooks run with a module: one in its place would lose them."""
    return bool(vars(module)["_forward_pre_hooks"] or vars(module)["_forward_hooks"])


@dataclass
class Plan:
    """What becomes of a network's convolutions: layer -> tile, or the reason. `products` per image of all of
    them, as planned, and `before` by direct convolution."""

    edits: list[Winograd | Quantize] = field(default_factory=list[Winograd | Quantize])
    tiles: dict[str, int] = field(default_factory=dict[str, int])
    smaller: dict[str, int] = field(default_factory=dict[str, int])
    direct: dict[str, str] = field(default_factory=dict[str, str])
    left: dict[str, str] = field(default_factory=dict[str, str])
    products: int = 0
    before: int = 0

    def reasons(self) -> dict[str, list[str]]:
        """Reason -> the layers that stay as they are for it."""
        return by_value(self.left)

    def notes(self) -> list[str]:
        notes = [f"{len(names)} layers by F{tile}: {listed(names)}" for tile, names in by_value(self.tiles).items()]
        notes.append(f"products per image in all convolutions: {self.before:,} -> {self.products:,}")
        notes += [
            f"{listed(names)} by F{tile}: their maps are smaller than the tile that was asked for"
            for tile, names in by_value(self.smaller).items()
        ]
        notes += [f"{listed(names)} quantized as direct: {why}" for why, names in by_value(self.direct).items()]
        return notes + [f"{listed(names)} left as is: {why}" for why, names in self.reasons().items()]


def by_value(table: dict[str, _T]) -> dict[_T, list[str]]:
    """Value -> the names that have it."""
    found: dict[_T, list[str]] = {}
    for name, value in table.items():
        found.setdefault(value, []).append(name)
    return found


def listed(names: list[str]) -> str:
    """Six of them, and how many more."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
