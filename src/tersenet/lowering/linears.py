"""Linear layers with a pruned weight: what they compute, and the kernels that leave out what is pruned."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.kernels.bf16 import Bf16
from tersenet.kernels.host import host
from tersenet.kernels.sparse_linear import SparseLinear
from tersenet.kernels.sparse_linear_call import algorithm_of, pack_linear, sparse_linear
from tersenet.lowering.activations import ACTIVATIONS
from tersenet.lowering.calls import watched

_BLOCK = 16  # outputs
_PIECE = 1 << 16
_MOST = {"sparse": 0.9, "scattered": 0.6}
"""Density of what a kernel keeps, above which there is nothing to gain: beside weights it reads where they are."""
_HALF = "amx half"
"""Of dense ones too: the weight in bfloat16."""
_CUTS = ("none", "relu", "relu6")
"""Activations that the kernels know."""


def density_of(weight: Tensor) -> float:
    """Share of the numbers that are not zero. In pieces that stay in the cache numpy takes a quarter of the time that
    torch takes."""
    numbers = weight.detach().reshape(-1).numpy()
    found = sum(int(np.count_nonzero(numbers[at : at + _PIECE] != 0)) for at in range(0, len(numbers), _PIECE))
    return found / len(numbers)


@dataclass(frozen=True)
class LinearLayer:
    """activation(x W^T + b) for x (..., in). `weight` (out, in), zero where it is pruned; `bias` (out,)."""

    name: str
    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    activation: str
    residual: bool = False
    reuse: bool = False

    def fits(self, choice: str) -> bool:
        """Whether the kernel `choice` can compute this, and less is left than it would have to gain by."""
        if choice not in _MOST:
            return choice in ("torch", _HALF)
        # Blocks are counted where that can matter: it takes a while.
        kept = self.density <= _MOST[choice]
        return kept and (choice == "scattered" or self.blocks <= _MOST[choice])

    def algorithm(self, choice: str) -> SparseLinear | Bf16:
        """Of a generated choice, on this processor. Raises: TersenetError where there are no kernels."""
        if choice == _HALF:
            return Bf16(host().amx())
        return algorithm_of(self.weight.shape[1], choice)

    @cached_property
    def density(self) -> float:
        """Share of the weights that are not zero."""
        return density_of(self.weight)

    @cached_property
    def blocks(self) -> float:
        """Share of the blocks of one input by 16 outputs that are not all zero."""
        parts = self.weight.split(_BLOCK)
        return sum(int((part != 0).any(0).sum()) for part in parts) / (len(parts) * self.weight.shape[1])

    @property
    def shape(self) -> tuple[Any, ...]:
        """Everything that decides about times, but for the input and the epilogue."""
        return ("linear", *self.weight.shape, self.bias is not None, round(self.density, 2), round(self.blocks, 2))

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """(..., out) for an input of `size`."""
        return (*size[:-1], self.weight.shape[0])

    @property
    def kind(self) -> str:
        """Such as `linear 512 -> 10, relu`."""
        outputs, inputs = self.weight.shape
        return f"linear {inputs} -> {outputs}" + (f", {self.activation}" if self.activation != "none" else "")


class TorchLinear(nn.Module):
    """Plain torch."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: LinearLayer) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight)
        self.register_buffer("bias", layer.bias)
        self._activation = ACTIVATIONS[layer.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self._activation(F.linear(x, self.weight, self.bias))


class PrunedLinear(nn.Module):
    """The generated kernels. For whoever watches operators, and for other types, plain torch with the weight unpacked
    anew: it is not kept beside the packed one."""

    def __init__(self, layer: LinearLayer, choice: str) -> None:
        super().__init__()
        self._packed = pack_linear(layer.weight, layer.bias, choice)
        self._bias = None if layer.bias is None else layer.bias.clone()
        self._activation = ACTIVATIONS[layer.activation]
        self._cut_off = layer.activation if layer.activation in _CUTS else None

    def forward(self, x: Tensor) -> Tensor:
        packed = self._packed
        fits = x.dtype == torch.float32 and x.is_cpu and x.dim() > 0 and x.shape[-1] == packed.in_features
        if watched(x) or not fits:
            return self._activation(F.linear(x, packed.dense(), self._bias))
        rows = x.reshape(-1, packed.in_features)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        y = sparse_linear(rows, packed, self._cut_off or "none").view(*x.shape[:-1], packed.out_features)
        return y if self._cut_off else self._activation(y)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedLinear:
        return self  # it never changes


def build_linear(layer: LinearLayer, choice: str) -> nn.Module:
    """The kernel `choice` for `layer`."""
    return TorchLinear(layer) if choice == "torch" else PrunedLinear(layer, choice)
