"""Edits: small frozen records of what was changed, replayed on a fresh model, real or on `meta`.

An edit holds everything that its replay needs (tensor names, axes, kept indices), so that a saved architecture does
not depend on how a later version traces a network. Edits only ever shrink, reorder, wrap, swap a convolution for one of
ours, split one or merge two into no more weights than there were: one from a stranger's file can't make a model larger
but by a few small tensors (in the Winograd domain a weight is some times its filter), or touch anything but its
tensors' axes, its integer sizes and its ReLUs.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator
from torch import nn

from tersenet.errors import GraphError
from tersenet.graph import lookup
from tersenet.graph.edit_fields import (
    MAX_INDEX,
    Budget,
    EditModel,
    Indices,
    Name,
    Order,
    Size,
    budget_of,
    format_indices,
    parse_indices,
)
from tersenet.graph.edits_layers import Fold, Group, Merge, Quantize, Split, Winograd, find_module, replace_module
from tersenet.graph.edits_sparse import Sparsify, WinogradDomain
from tersenet.nn.adapter import ChannelAdapter

__all__ = [
    "Adapt", "Attribute", "Axis", "Budget", "Edit", "Fold", "Group", "Keep", "Merge", "Quantize", "Reorder", "Resize",
    "Slice", "Sparsify", "Split", "Winograd", "WinogradDomain", "format_indices", "is_size", "parse_indices",
]  # fmt: skip

# Any size that a network's own code keeps, but nothing that says how a layer computes, and nothing of nn.Module's own.
_SIZE_NAME = r"^[A-Za-z][A-Za-z0-9_]*$"
_NO_SIZES = frozenset("training stride padding dilation kernel_size output_padding scale_factor".split())


class Slice(EditModel):
    """Keep these indices of one axis of these tensors."""

    tensors: tuple[Name, ...]
    axis: int = Field(ge=0, le=5)
    keep: Indices


def is_size(name: str) -> bool:
    """Whether an edit may set a module's attribute of this name."""
    return name not in _NO_SIZES and not name.startswith("_")


class Attribute(EditModel):
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


class Keep(EditModel):
    """Keep some channels of a group, everywhere they occur."""

    kind: Literal["keep"] = "keep"
    group: Annotated[str, Field(max_length=512)]
    slices: tuple[Slice, ...]
    attributes: tuple[Attribute, ...] = ()

    def replay(self, model: nn.Module) -> None:
        places: dict[int, NDArray[np.int64]] = {}
        for part in self.slices:
            new: dict[int, torch.Tensor] = {}
            if id(part.keep) not in places:
                places[id(part.keep)] = np.asarray(part.keep, dtype=np.int64)
            for name in part.tensors:
                _slice_tensor(model, name, part.axis, places[id(part.keep)], new)
        for attribute in self.attributes:
            attribute.replay(model)


class Resize(EditModel):
    """Sizes that the network's own code keeps in attributes, such as the widths that it splits at."""

    kind: Literal["resize"] = "resize"
    attributes: tuple[Attribute, ...]

    def replay(self, model: nn.Module) -> None:
        for attribute in self.attributes:
            attribute.replay(model)


class Adapt(EditModel):
    """Wrap a layer: read only these channels, put its output back at full width, add a constant at the borders."""

    kind: Literal["adapt"] = "adapt"
    module: Name
    gather: Indices | None = None
    scatter: Indices | None = None
    width: int | None = Field(default=None, ge=1, le=MAX_INDEX)
    taps: bool = False

    @field_validator("width")
    @classmethod
    def _within_budget(cls, value: int | None, info: ValidationInfo) -> int | None:
        budget = budget_of(info)
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
        replace_module(model, layer, adapter)


class Axis(EditModel):
    """One axis of these tensors, which are one tensor under several names."""

    tensors: Annotated[tuple[Name, ...], Field(min_length=1)]
    axis: int = Field(ge=0, le=5)


class Reorder(EditModel):
    """Put the channels of a group in another order, everywhere they occur. The network computes the same."""

    kind: Literal["reorder"] = "reorder"
    group: Annotated[str, Field(max_length=512)]
    order: Order
    axes: tuple[Axis, ...]

    def replay(self, model: nn.Module) -> None:
        for part in self.axes:
            new: dict[int, torch.Tensor] = {}
            for name in part.tensors:
                _slice_tensor(model, name, part.axis, np.asarray(self.order, dtype=np.int64), new, whole=True)


Edit = Annotated[
    Keep | Resize | Adapt | Reorder | Group | Winograd | Quantize | Split | Merge | Fold | WinogradDomain | Sparsify,
    Field(discriminator="kind"),
]


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
    keep: NDArray[np.int64],
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
    if not whole and (axis >= tensor.dim() or not len(keep) or keep[-1] >= tensor.shape[axis]):
        last = keep[-1] if len(keep) else "nothing"
        raise GraphError(f"edit keeps index {last} of axis {axis} of {name!r}, whose shape is {tuple(tensor.shape)}")
    if id(tensor) not in made:
        kept = _picked(tensor.detach(), axis, keep)
        made[id(tensor)] = nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
    # Assigning keeps a buffer a buffer, and its persistence.
    setattr(owner, leaf, made[id(tensor)])


def _picked(tensor: torch.Tensor, axis: int, keep: NDArray[np.int64]) -> torch.Tensor:
    shape = (*tensor.shape[:axis], len(keep), *tensor.shape[axis + 1 :])
    if tensor.is_meta:
        return torch.empty(shape, device="meta", dtype=tensor.dtype)
    # A kernel of one value: nearly twice as fast where torch knows that there are no axes behind.
    flat = tensor.flatten(axis) if math.prod(tensor.shape[axis:]) == tensor.shape[axis] else tensor
    return flat.index_select(axis, torch.from_numpy(keep).to(tensor.device)).view(shape)
