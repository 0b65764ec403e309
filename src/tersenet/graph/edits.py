"""Edits: small frozen records of what was changed, replayed on a fresh model, real or on `meta`.

An edit holds everything that its replay needs (tensor names, axes, kept indices), so that a saved architecture does
not depend on how a later version traces a network. Edits only ever shrink, reorder, wrap, or swap a
convolution for one of ours: one from a stranger's file can't make a model larger but by a few small tensors, or touch
anything but its tensors' axes and its integer sizes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationInfo, field_validator
from torch import nn

from tersenet.errors import GraphError
from tersenet.graph import lookup
from tersenet.nn.adapter import ChannelAdapter
from tersenet.nn.group_shuffle import GroupShuffleConv2d
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d
from tersenet.nn.winograd_settings import Quantization, WinogradSettings

_RANGES = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", re.ASCII)
_NUMBERS = re.compile(r"\d{1,8}(,\d{1,8})*", re.ASCII)
_MAX_INDEX = 10_000_000
# Any size that a network's own code keeps, but nothing that says how a layer computes, and nothing of nn.Module's own.
_SIZE_NAME = r"^[A-Za-z][A-Za-z0-9_]*$"
_NO_SIZES = frozenset("training stride padding dilation kernel_size output_padding scale_factor".split())
Name = Annotated[str, Field(max_length=512, pattern=r"^[A-Za-z0-9_.\-]*$")]


@dataclass
class Budget:
    """How many numbers a file may still stand for: `0-9999999` is short, a thousand of them exhaust memory.

    It is the validation context of whatever reads edits from a file. Large networks need some millions.
    """

    left: int = 20_000_000

    def take(self, count: int) -> None:
        if count > self.left:
            raise ValueError("the file stands for more indices than any network has")
        self.left -= count


def parse_indices(value: object, budget: Budget | None = None) -> tuple[int, ...]:
    """`"0-3,7"` or any sequence of increasing integers."""
    if isinstance(value, str):
        if not _RANGES.fullmatch(value):
            raise ValueError(f"indices must look like 0-3,7 (got {value[:40]!r})")
        indices: list[int] = []
        for part in value.split(","):
            first, _, last = part.partition("-")
            start, stop = int(first), int(last or first) + 1
            if stop > _MAX_INDEX or stop <= start or (indices and start <= indices[-1]):
                raise ValueError(f"indices {part!r} are out of range or out of order")
            if budget is not None:
                budget.take(stop - start)
            indices.extend(range(start, stop))
        return tuple(indices)
    try:
        array = np.asarray(value, dtype=np.int64).reshape(-1)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"indices must be integers ({error})") from None
    if (np.diff(array) <= 0).any() or (array[:1] < 0).any():
        raise ValueError("indices must be increasing and not negative")
    return tuple(array.tolist())


def _budget(info: ValidationInfo) -> Budget | None:
    return info.context if isinstance(info.context, Budget) else None


def _read_indices(value: object, info: ValidationInfo) -> tuple[int, ...]:
    return parse_indices(value, _budget(info))


def format_indices(indices: tuple[int, ...]) -> str:
    """The inverse of `parse_indices`: runs as `first-last`."""
    if not indices:
        return ""
    array = np.asarray(indices)
    runs = np.split(array, np.flatnonzero(np.diff(array) != 1) + 1)
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


Indices = Annotated[tuple[int, ...], BeforeValidator(_read_indices), PlainSerializer(format_indices)]


def _read_order(value: object, info: ValidationInfo) -> tuple[int, ...]:
    """`"2,0,1"` or any sequence that holds each number below its length once."""
    if isinstance(value, str):
        if not _NUMBERS.fullmatch(value):
            raise ValueError(f"an order of channels must look like 2,0,1 (got {value[:40]!r})")
        value = value.split(",")
    try:
        array = np.asarray(value, dtype=np.int64).reshape(-1)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"an order of channels must be of integers ({error})") from None
    if len(array) == 0 or not np.array_equal(np.sort(array), np.arange(len(array))):
        raise ValueError("an order of channels must hold each number below its length once")
    budget = _budget(info)
    if budget is not None:
        budget.take(len(array))
    return tuple(array.tolist())


def _format_order(order: tuple[int, ...]) -> str:
    return ",".join(map(str, order))


Order = Annotated[tuple[int, ...], BeforeValidator(_read_order), PlainSerializer(_format_order)]


class _Edit(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Slice(_Edit):
    """Keep these indices of one axis of these tensors."""

    tensors: tuple[Name, ...]
    axis: int = Field(ge=0, le=5)
    keep: Indices


def is_size(name: str) -> bool:
    """Whether an edit may set a module's attribute of this name."""
    return name not in _NO_SIZES and not name.startswith("_")


Size = Annotated[int, Field(ge=0, le=_MAX_INDEX)]


class Attribute(_Edit):
    """A module's integer size, or its list of sizes, after the edit; never larger than before."""

    module: Name
    name: Annotated[str, Field(max_length=128, pattern=_SIZE_NAME)]
    value: Size | Annotated[tuple[Size, ...], Field(max_length=1024)]

    @field_validator("name")
    @classmethod
    def _is_size(cls, value: str) -> str:
        if not is_size(value):
            raise ValueError(f"{value!r} does not match the pattern of a size's name")
        return value

    def replay(self, model: nn.Module) -> None:
        module = find_module(model, self.module)
        old = vars(module).get(self.name)
        if not _shrinks(old, self.value):
            raise GraphError(
                f"edit of {self.module}: {self.name} (={old}) can't become {self.value}; an edit only shrinks integer "
                "sizes"
            )
        setattr(module, self.name, list(self.value) if isinstance(old, list) else self.value)  # pyright: ignore


def _shrinks(old: object, new: int | tuple[int, ...]) -> bool:
    if isinstance(new, int):
        return isinstance(old, int) and not isinstance(old, bool) and new <= old
    if not isinstance(old, (list, tuple)) or len(new) != len(old):  # pyright: ignore[reportUnknownArgumentType]
        return False
    return all(_shrinks(o, n) for o, n in zip(old, new, strict=True))  # pyright: ignore[reportUnknownArgumentType]


class Keep(_Edit):
    """Keep some channels of a group, everywhere they occur."""

    kind: Literal["keep"] = "keep"
    group: Annotated[str, Field(max_length=512)]
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()

    def replay(self, model: nn.Module) -> None:
        for part in self.slices:
            new: dict[int, torch.Tensor] = {}
            for name in part.tensors:
                _slice_tensor(model, name, part.axis, part.keep, new)
        for attribute in self.attributes:
            attribute.replay(model)


class Resize(_Edit):
    """Sizes that the network's own code keeps in attributes, such as the widths that it splits at."""

    kind: Literal["resize"] = "resize"
    attributes: tuple[Attribute, ...]

    def replay(self, model: nn.Module) -> None:
        for attribute in self.attributes:
            attribute.replay(model)


class Adapt(_Edit):
    """Wrap a layer: read only these channels, put its output back at full width, add a constant at the borders."""

    kind: Literal["adapt"] = "adapt"
    module: Name
    gather: Indices | None = None
    scatter: Indices | None = None
    width: int | None = Field(default=None, ge=1, le=_MAX_INDEX)
    taps: bool = False

    @field_validator("width")
    @classmethod
    def _within_budget(cls, value: int | None, info: ValidationInfo) -> int | None:
        budget = _budget(info)
        if budget is not None and value is not None:
            budget.take(value)
        return value

    def replay(self, model: nn.Module) -> None:
        layer = find_module(model, self.module)
        if layer is model:
            raise GraphError("edit wraps the whole network; it must name one of its layers")
        if isinstance(layer, ChannelAdapter):
            raise GraphError(f"edit wraps {self.module!r}, which is wrapped already")
        _check_count(layer, self.module, "reads", self.gather, ("in_channels", "in_features"))
        _check_count(layer, self.module, "makes", self.scatter, ("out_channels", "out_features"))
        adapter = ChannelAdapter(layer, self.gather, self.scatter, self.width, self.taps)
        tensor = next((t for t in layer.parameters() if t.is_floating_point()), None)
        # On meta the index tables must stay real: they are not in the state dict that fills the model.
        if tensor is not None and not tensor.is_meta:
            adapter.to(device=tensor.device, dtype=tensor.dtype)
        adapter.train(layer.training)
        _replace(model, layer, adapter)


class Axis(_Edit):
    """One axis of these tensors, which are one tensor under several names."""

    tensors: Annotated[tuple[Name, ...], Field(min_length=1)]
    axis: int = Field(ge=0, le=5)


class Reorder(_Edit):
    """Put the channels of a group in another order, everywhere they occur. The network computes the same."""

    kind: Literal["reorder"] = "reorder"
    group: Annotated[str, Field(max_length=512)]
    order: Order
    axes: tuple[Axis, ...]

    def replay(self, model: nn.Module) -> None:
        for part in self.axes:
            new: dict[int, torch.Tensor] = {}
            for name in part.tensors:
                _slice_tensor(model, name, part.axis, self.order, new, whole=True)


class Group(_Edit):
    """Make a convolution a grouped one, of `groups` equal blocks of its channels in these orders."""

    kind: Literal["group"] = "group"
    module: Name
    groups: int = Field(ge=2, le=65536)
    rows: Order
    columns: Order

    def replay(self, model: nn.Module) -> None:
        layer = find_module(model, self.module)
        if type(layer) is not nn.Conv2d or layer is model:
            raise GraphError(f"edit groups {self.module!r}, a {type(layer).__name__}; only a plain Conv2d can be")
        if (len(self.rows), len(self.columns)) != (layer.out_channels, layer.in_channels):
            raise GraphError(
                f"edit orders {len(self.rows)} x {len(self.columns)} channels of {self.module!r}, which has "
                f"{layer.out_channels} x {layer.in_channels}"
            )
        _replace(model, layer, GroupShuffleConv2d.from_conv(layer, self.groups, self.rows, self.columns))


class Winograd(_Edit):
    """Compute a plain convolution by Winograd's F(m, r), with these settings."""

    kind: Literal["winograd"] = "winograd"
    module: Name
    settings: WinogradSettings

    def replay(self, model: nn.Module) -> None:
        conv = _plain_convolution(model, self.module)
        _replace(model, conv, WinogradConv2d.from_conv(conv, self.settings))


class Quantize(_Edit):
    """Fake-quantize input, weight and output of a plain convolution."""

    kind: Literal["quantize"] = "quantize"
    module: Name
    quantization: Quantization

    def replay(self, model: nn.Module) -> None:
        conv = _plain_convolution(model, self.module)
        _replace(model, conv, QuantizedConv2d.from_conv(conv, self.quantization))


Edit = Annotated[Keep | Resize | Adapt | Reorder | Group | Winograd | Quantize, Field(discriminator="kind")]


def _plain_convolution(model: nn.Module, name: str) -> nn.Conv2d:
    """Raises: GraphError unless it is an nn.Conv2d itself: a subclass computes something else."""
    layer = find_module(model, name)
    if type(layer) is not nn.Conv2d or layer is model:
        raise GraphError(f"edit swaps {name!r}, a {type(layer).__name__}; it must be an nn.Conv2d inside the network")
    return layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    # A module may be registered under several names; it is one layer, and stays one.
    for place in [name for name, child in model.named_modules(remove_duplicate=False) if child is old]:
        parent, _, name = place.rpartition(".")
        setattr(find_module(model, parent), name, new)


def find_module(model: nn.Module, name: str) -> nn.Module:
    try:
        return lookup.submodule(model, name)
    except AttributeError as error:
        raise GraphError(f"edit names the module {name!r}, which this network does not have") from error


def _check_count(
    layer: nn.Module, name: str, verb: str, indices: tuple[int, ...] | None, sizes: tuple[str, ...]
) -> None:
    """Raises: GraphError if a layer of known size is to have another number of channels around it."""
    known = next((size for size in (getattr(layer, s, None) for s in sizes) if isinstance(size, int)), None)
    if indices is not None and known is not None and len(indices) != known:
        raise GraphError(f"edit puts {len(indices)} channels around {name!r}, which {verb} {known}")


def _slice_tensor(
    model: nn.Module,
    name: str,
    axis: int,
    keep: tuple[int, ...],
    made: dict[int, torch.Tensor],
    whole: bool = False,
) -> None:
    """Cut one tensor, or with `whole` only put it in order. `made` are those of this slice, by the id of the old one:
    names of one tensor stay so."""
    owner_name, _, leaf = name.rpartition(".")
    owner = find_module(model, owner_name)
    tensor = lookup.own_tensor(owner, leaf)
    if tensor is None:
        raise GraphError(f"edit names the tensor {name!r}, which this network does not have")
    if whole and (axis >= tensor.dim() or len(keep) != tensor.shape[axis]):
        raise GraphError(f"edit orders {len(keep)} places of axis {axis} of {name!r}, of shape {tuple(tensor.shape)}")
    if not whole and (axis >= tensor.dim() or not keep or keep[-1] >= tensor.shape[axis]):
        last = keep[-1] if keep else "nothing"
        raise GraphError(f"edit keeps index {last} of axis {axis} of {name!r}, whose shape is {tuple(tensor.shape)}")
    if id(tensor) not in made:
        index: NDArray[np.int64] = np.asarray(keep, dtype=np.int64)
        kept = tensor.detach().index_select(axis, torch.from_numpy(index).to(tensor.device))
        made[id(tensor)] = nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
    # Assigning keeps a buffer a buffer, and its persistence.
    setattr(owner, leaf, made[id(tensor)])
