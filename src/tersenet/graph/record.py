"""What a network was built from: enough to build it again, on `meta`, without running anybody's code."""

from __future__ import annotations

from math import prod
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import nn

from tersenet.graph.edits import Edit

Scalar = bool | int | float | str | None
_ATTRIBUTE = "tersenet_record"
_MAX_ELEMENTS = 2**27


class InputSpec(BaseModel):
    """One input image: (C, H, W), and the mean and standard deviation that it is normalised with, if they are known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    shape: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(min_length=1, max_length=5)
    mean: tuple[float, ...] | None = None
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None

    @field_validator("shape")
    @classmethod
    def _fits_in_memory(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if prod(value) > _MAX_ELEMENTS:
            raise ValueError(f"an input of {prod(value):,} numbers; at most {_MAX_ELEMENTS:,} are read from a file")
        return value


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
