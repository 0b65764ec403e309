"""The inputs of one forward pass: what they may be, and noise in their place."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from tersenet.errors import TersenetError

MAX_INPUTS = 16
Kind = Literal["float", "bool", "uint8", "int8", "int16", "int32", "int64"]
"""Of numbers: `float` is whatever floating type the weights have."""


def checked(example: Any) -> tuple[Tensor, ...]:
    """The inputs in `example`: a tensor, or a tuple of tensors whose first axis is the batch.

    Raises:
        TersenetError: something else, sizes that are none, or batches of different sizes.
    """
    inputs: tuple[Any, ...] = tuple(example) if isinstance(example, (tuple, list)) else (example,)  # pyright: ignore
    rule = "an example is a tensor, or a tuple of tensors, whose first axis is the batch"
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise TersenetError(f"an example of {len(inputs)} inputs; {rule}, 1 to {MAX_INPUTS} of them")
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
        if kind_of(x) not in get_args(Kind):
            raise TersenetError(f"input {number} of the example is {x.dtype}; known: {', '.join(get_args(Kind))}")
    if inputs[0].dim() < 2:
        raise TersenetError(
            f"input 0 of the example has shape {tuple(inputs[0].shape)}: put an input of more than one axis first"
        )
    return inputs


def kind_of(x: Tensor) -> Kind:
    """Of one of `checked`; of other tensors it may be no `Kind`."""
    return cast(Kind, "float" if x.is_floating_point() else str(x.dtype).removeprefix("torch."))


def random_like(example: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Normal noise in place of every floating tensor of `example`, also in lists and dicts; the rest is passed on."""
    generator = torch.Generator().manual_seed(seed)

    def noise(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        if isinstance(x, (list, tuple)):
            return type(x)(noise(v) for v in x)  # pyright: ignore
        return {k: noise(v) for k, v in x.items()} if isinstance(x, dict) else x  # pyright: ignore

    return tuple(noise(x) for x in example)
