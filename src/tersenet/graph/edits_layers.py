"""Edits that put another layer in a convolution's place: a grouped, a Winograd or a quantized one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from tersenet.errors import GraphError
from tersenet.graph import lookup
from tersenet.graph.edit_fields import EditModel, Name, Order
from tersenet.nn.group_shuffle import GroupShuffleConv2d
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d
from tersenet.nn.winograd_settings import Quantization, WinogradSettings


class Group(EditModel):
    """Make a convolution a grouped one, of `groups` equal blocks of its channels in these orders."""

    kind: Literal["group"] = "group"
    module: Name
    groups: int = Field(ge=2, le=65536)
    rows: Order
    columns: Order

    def replay(self, model: nn.Module) -> None:
        layer = _plain_convolution(model, self.module)
        if (len(self.rows), len(self.columns)) != (layer.out_channels, layer.in_channels):
            raise GraphError(
                f"edit orders {len(self.rows)} x {len(self.columns)} channels of {self.module!r}, which has "
                f"{layer.out_channels} x {layer.in_channels}"
            )
        replace_module(model, layer, GroupShuffleConv2d.from_conv(layer, self.groups, self.rows, self.columns))


class Winograd(EditModel):
    """Compute a plain convolution by Winograd's F(m, r), with these settings."""

    kind: Literal["winograd"] = "winograd"
    module: Name
    settings: WinogradSettings

    def replay(self, model: nn.Module) -> None:
        conv = _plain_convolution(model, self.module)
        replace_module(model, conv, WinogradConv2d.from_conv(conv, self.settings))


class Quantize(EditModel):
    """Fake-quantize input, weight and output of a plain convolution."""

    kind: Literal["quantize"] = "quantize"
    module: Name
    quantization: Quantization

    def replay(self, model: nn.Module) -> None:
        conv = _plain_convolution(model, self.module)
        replace_module(model, conv, QuantizedConv2d.from_conv(conv, self.quantization))


def _plain_convolution(model: nn.Module, name: str) -> nn.Conv2d:
    """Raises: GraphError unless it is an nn.Conv2d itself: a subclass computes something else."""
    layer = find_module(model, name)
    if type(layer) is not nn.Conv2d or layer is model:
        raise GraphError(f"edit swaps {name!r}, a {type(layer).__name__}; it must be an nn.Conv2d inside the network")
    return layer


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`, wherever that is: a layer under several names stays one."""
    for place in [name for name, child in model.named_modules(remove_duplicate=False) if child is old]:
        parent, _, name = place.rpartition(".")
        setattr(find_module(model, parent), name, new)


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Raises: GraphError if there is none."""
    try:
        return lookup.submodule(model, name)
    except AttributeError as error:
        raise GraphError(f"edit names the module {name!r}, which this network does not have") from error
