"""What a network was built from: enough to build it again, on `meta`, without running anybody's code."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from tersenet.graph.edits import Edit
from tersenet.graph.example import MAX_INPUTS, Kind, checked, kind_of

Scalar = bool | int | float | str | None
_ATTRIBUTE = "tersenet_record"
_MAX_ELEMENTS = 2**27
Size = Annotated[int, Field(ge=1, le=65536)]


def _fits_in_memory(value: tuple[int, ...]) -> tuple[int, ...]:
    if prod(value) > _MAX_ELEMENTS:
        raise ValueError(f"an input of {prod(value):,} numbers; at most {_MAX_ELEMENTS:,} are read from a file")
    return value


class TensorSpec(BaseModel):
    """One sample of one more input: its shape without the batch axis, and its kind of number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[Size, ...] = Field(max_length=5)
    kind: Kind = "float"

    _fits = field_validator("shape")(_fits_in_memory)


class InputSpec(BaseModel):
    """One sample of what forward takes: an image (C, H, W), and the mean and standard deviation that it is normalised
    with, if they are known. `more` are the inputs after the first."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    shape: tuple[Size, ...] = Field(min_length=1, max_length=5)
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    kind: Kind = "float"
    more: tuple[TensorSpec, ...] = Field(default=(), max_length=MAX_INPUTS - 1)

    _fits = field_validator("shape")(_fits_in_memory)

    def zeros(self, batch: int, like: Tensor) -> tuple[Tensor, ...]:
        """One tensor per input, on the device of `like`; floating ones have its type."""

        def made(shape: tuple[int, ...], kind: Kind) -> Tensor:
            dtype = like.dtype if kind == "float" else getattr(torch, kind)
            return torch.zeros(batch, *shape, device=like.device, dtype=dtype)

        return (made(self.shape, self.kind), *(made(one.shape, one.kind) for one in self.more))


def input_of(example: Any) -> InputSpec:
    """What is kept of the inputs of one forward pass: a tensor, or a tuple of tensors whose first axis is the batch.

    Raises:
        TersenetError: something else, sizes that are none, or batches of different sizes.
    """
    inputs = checked(example)
    specs = [TensorSpec(shape=tuple(x.shape[1:]), kind=kind_of(x)) for x in inputs]
    return InputSpec(shape=specs[0].shape, kind=specs[0].kind, more=tuple(specs[1:]))


class Record(BaseModel):
    """`base` is a built-in model's name, or a user's own: None, or the `package.module:function` that was named on the
    command line. Loading never imports it, but asks for the network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None
    arguments: dict[str, Scalar] = Field(default_factory=dict[str, Scalar])
    input: InputSpec
    edits: tuple[Edit, ...] = ()


def record_of(model: nn.Module) -> Record | None:
    """The record that `attach` put on this model; it survives copy.deepcopy."""
    return getattr(model, _ATTRIBUTE, None)


def attach(model: nn.Module, record: Record) -> None:
    setattr(model, _ATTRIBUTE, record)
