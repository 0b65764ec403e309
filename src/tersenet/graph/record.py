"""What a network was built from: enough to build it again, on `meta`, without running anybody's code."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal, cast, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.graph.edits import Edit

Scalar = bool | int | float | str | None
_ATTRIBUTE = "tersenet_record"
_MAX_ELEMENTS = 2**27
_MAX_INPUTS = 16
Size = Annotated[int, Field(ge=1, le=65536)]
Kind = Literal["float", "bool", "uint8", "int8", "int16", "int32", "int64"]
"""Of numbers: `float` is whatever floating type the weights have."""


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
    more: tuple[TensorSpec, ...] = Field(default=(), max_length=_MAX_INPUTS - 1)

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
    inputs: tuple[Any, ...] = tuple(example) if isinstance(example, (tuple, list)) else (example,)  # pyright: ignore
    rule = "an example is a tensor, or a tuple of tensors, whose first axis is the batch"
    if not 1 <= len(inputs) <= _MAX_INPUTS:
        raise TersenetError(f"an example of {len(inputs)} inputs; {rule}, 1 to {_MAX_INPUTS} of them")
    specs: list[TensorSpec] = []
    for number, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TersenetError(
                f"input {number} of the example is a {type(x).__name__}; {rule}. For a forward that takes something "
                "else, pass a module whose forward takes tensors and calls yours"
            )
        if not 1 <= x.dim() <= 6 or min(x.shape) < 1 or max(x.shape[1:], default=1) > 65536:
            raise TersenetError(
                f"input {number} of the example has shape {tuple(x.shape)}; {rule}, of sizes 1 to 65536"
            )
        if len(x) != len(inputs[0]):
            raise TersenetError(
                f"input {number} of the example has a batch of {len(x)}, input 0 one of {len(inputs[0])}; {rule}, and "
                "the same for all"
            )
        kinds = get_args(Kind)
        kind = "float" if x.is_floating_point() else str(x.dtype).removeprefix("torch.")
        if kind not in kinds:
            raise TersenetError(f"input {number} of the example is {x.dtype}; known: {', '.join(kinds)}")
        specs.append(TensorSpec(shape=tuple(x.shape[1:]), kind=cast(Kind, kind)))
    if not specs[0].shape:
        raise TersenetError(
            f"input 0 of the example has shape {tuple(inputs[0].shape)}: put an input of more than one axis first"
        )
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
