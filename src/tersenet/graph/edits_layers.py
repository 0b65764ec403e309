"""Edits that put another layer in a convolution's place: a grouped, a Winograd or a quantized one, two of lower rank,
or one for two, of which the second may be a batch norm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from tersenet.errors import GraphError, TersenetError
from tersenet.graph import lookup
from tersenet.graph.edit_fields import EditModel, Name, Order
from tersenet.nn.batch_norm_fold import folded
from tersenet.nn.group_shuffle import GroupShuffleConv2d
from tersenet.nn.low_rank import Form, merged, pair_of
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
        layer = plain_convolution(model, self.module)
        if (len(self.rows), len(self.columns)) != (layer.out_channels, layer.in_channels):
            raise GraphError(
                f"edit orders {len(self.rows)} x {len(self.columns)} channels of {self.module!r}, which has "
                f"{layer.out_channels} x {layer.in_channels}"
            )
        replace_module(model, layer, GroupShuffleConv2d.from_conv(layer, self.groups, self.rows, self.columns))


class Winograd(EditModel):
    """Compute a plain convolution, or one that was grouped here, by Winograd's F(m, r), with these settings."""

    kind: Literal["winograd"] = "winograd"
    module: Name
    settings: WinogradSettings

    def replay(self, model: nn.Module) -> None:
        conv = plain_convolution(model, self.module, grouped=True)
        replace_module(model, conv, WinogradConv2d.from_conv(conv, self.settings))


class Quantize(EditModel):
    """Fake-quantize input, weight and output of a plain convolution, or of one that was grouped here."""

    kind: Literal["quantize"] = "quantize"
    module: Name
    quantization: Quantization

    def replay(self, model: nn.Module) -> None:
        conv = plain_convolution(model, self.module, grouped=True)
        replace_module(model, conv, QuantizedConv2d.from_conv(conv, self.quantization))


class Split(EditModel):
    """Make a convolution two of this rank, one behind the other: `NAME.0` and `NAME.1`."""

    kind: Literal["split"] = "split"
    module: Name
    form: Form
    rank: int = Field(ge=1, le=65536)

    def replay(self, model: nn.Module) -> None:
        conv = plain_convolution(model, self.module)
        try:
            pair = pair_of(conv, self.form, self.rank)
        except TersenetError as error:
            raise GraphError(f"edit splits {self.module!r}: {error}") from None
        # A pair of full rank can be dearer than the layer; a file could split it again and again.
        if sum(p.numel() for p in pair.parameters()) > sum(p.numel() for p in conv.parameters()):
            raise GraphError(f"edit splits {self.module!r} in two of rank {self.rank}, which have more weights than it")
        replace_module(model, conv, pair)


class Merge(EditModel):
    """Make a convolution and the 1 x 1 convolution behind it one, in the place of the first."""

    kind: Literal["merge"] = "merge"
    first: Name
    second: Name

    def replay(self, model: nn.Module) -> None:
        first, second = plain_convolution(model, self.first), plain_convolution(model, self.second)
        try:
            one = merged(first, second)
        except TersenetError as error:
            raise GraphError(f"edit merges {self.first!r} and {self.second!r}: {error}") from None
        replace_module(model, second, nn.Identity())
        replace_module(model, first, one)


class Fold(EditModel):
    """Put a batch norm into the weight and bias of the convolution before it. Layers that share them are refused."""

    kind: Literal["fold"] = "fold"
    module: Name
    norm: Name

    def replay(self, model: nn.Module) -> None:
        conv, norm = plain_convolution(model, self.module), find_module(model, self.norm)
        if type(norm) is not nn.BatchNorm2d:
            raise GraphError(f"edit folds {self.norm!r}, a {type(norm).__name__}; it must be an nn.BatchNorm2d")
        try:
            one = folded(conv, norm)
        except TersenetError as error:
            raise GraphError(f"edit folds {self.norm!r} into {self.module!r}: {error}") from None
        replace_module(model, norm, nn.Identity())
        replace_module(model, conv, one)


def plain_convolution(model: nn.Module, name: str, *, grouped: bool = False) -> nn.Conv2d:
    """Raises: GraphError unless it is an nn.Conv2d itself, or with `grouped` one of ours between two orders of
    channels: another subclass computes something else."""
    layer = find_module(model, name)
    if grouped and type(layer) is GroupShuffleConv2d:
        return layer
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
