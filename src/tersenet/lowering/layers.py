"""What a convolution of the lowered network computes, with what follows it, and the kernels that fit it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tersenet.kernels.amx import Amx
from tersenet.kernels.bf16 import Bf16
from tersenet.kernels.compiled import Code
from tersenet.kernels.gemm import Gemm
from tersenet.kernels.generate import OUTPUTS, Algorithm, R, isa_of
from tersenet.kernels.host import host
from tersenet.kernels.layout import image_size
from tersenet.lowering.integers import INT8, IntegerLayer
from tersenet.lowering.linears import LinearLayer, density_of
from tersenet.ops.winograd_tiles import Geometry

Pair = tuple[int, int]

WINOGRAD = {
    "F2": (2, "float"),
    "F4": (4, "float"),
    "F6": (6, "float"),
    "F2 half": (2, "half"),
    "F4 half": (4, "half"),
    "F2 amx": (2, "parts"),
    "F4 amx": (4, "parts"),
    "F2 amx half": (2, "bfloat16"),
}
"""Choice -> m, and how the packed weight is kept. F6 of parts is less exact, and no faster than F4; F4 rounded to
bfloat16 is off by 2 %."""
SPARSE = ("sparse", "scattered")
"""Choices that leave out what is pruned, by F(m, 3) of the layer's own m: blocks of a vector of output channels that
are all zero, or single weights."""
GEMM = "gemm"
"""The generated kernel for dense convolutions, a product of matrices."""
AMX = "amx"
"""The same on AMX's matrix tiles: products of the bfloat16 parts of float32 numbers, summed in float32."""
_AMX_GROUP = 8  # channels of a group; with fewer, tiles are too empty to be worth a try
AMX_HALF = "amx half"
"""The same with inputs and weights rounded to bfloat16, in which results may stay."""
CHOICES = ("torch", "direct", GEMM, AMX, AMX_HALF, *WINOGRAD, *SPARSE, INT8)


@dataclass(frozen=True)
class Layer:
    """activation(conv2d(x, weight, bias) + residual). `weight` (C_out, C_in / groups, kH, kW), `bias` (C_out,).

    `reuse`: the result may be written over the residual, which nobody reads any more.
    """

    name: str
    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    residual: bool
    activation: str
    reuse: bool = False

    @property
    def fits_winograd(self) -> bool:
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1
        return plain and tuple(self.weight.shape[2:]) == (R, R)

    def fits(self, choice: str) -> bool:
        """Whether the kernel `choice` can compute this."""
        if choice in (AMX, AMX_HALF):
            wide = min(self.weight.shape[0] // self.groups, self.weight.shape[1]) >= _AMX_GROUP
            if choice == AMX_HALF:
                return self.groups == 1 or wide
            is_single = self.stride == (1, 1) or (self.dilation == (1, 1) and self.groups == 1)
            is_pixel = self.dilation == (1, 1) and tuple(self.weight.shape[2:]) == (1, 1)
            return (self.groups == 1 or wide) and (is_single or is_pixel)
        if choice == GEMM:
            return self.groups == 1 and self.dilation == (1, 1)
        return choice in ("torch", "direct") or (choice in WINOGRAD and self.fits_winograd)

    def algorithm(self, choice: str) -> Code:
        """Of a generated choice, on this processor. Raises: TersenetError where there are no kernels."""
        if choice == GEMM:
            return Gemm(host().isa())
        if choice == AMX:
            return Amx(host().amx())
        if choice == AMX_HALF:
            return Bf16(host().amx())
        m, kept = WINOGRAD[choice]
        return Algorithm(m, isa_of(kept), kept)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Everything that decides about times, but for the input and the epilogue; not the weights' values."""
        taken = (tuple(self.weight.shape), self.bias is not None, self.stride, self.padding, self.dilation)
        return (*taken, self.groups)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """(N, C_out, H', W') for an input of `size`."""
        image = image_size(size[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation)
        return (size[0], self.weight.shape[0], *image)

    @property
    def kind(self) -> str:
        """Such as `3x3 64 -> 128 /2 + residual, relu`."""
        outputs, inputs, *kernel = self.weight.shape
        text = f"{kernel[0]}x{kernel[1]} {inputs * self.groups} -> {outputs}"
        text += f" /{self.stride[0]}" if max(self.stride) > 1 else ""
        text += f" groups {self.groups}" if self.groups > 1 else ""
        return text + _epilogue(self.residual, self.activation)


@dataclass(frozen=True)
class DomainLayer:
    """activation(A^T [sum over C_in of W * V] A + bias + residual) with V = B^T d B for every tile d, or its ReLU, or
    what of it is further than `threshold` from zero.

    `weight` (t t, C_in, C_out) is in the Winograd domain, zero where it is pruned; `bias` (C_out,), A^T (m, t), B^T
    (t, t). `points` is the name of the set that these come from, if it has one. `reuse` as of `Layer`.
    """

    name: str
    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    at: Tensor = field(repr=False)
    bt: Tensor = field(repr=False)
    points: str | None
    relu: bool
    geometry: Geometry
    residual: bool
    activation: str
    reuse: bool = False
    threshold: float = 0.0

    @property
    def hindrance(self) -> str | None:
        """Why there are no generated kernels for it; None if there are."""
        (top, bottom), (left, right) = self.geometry.padding
        if self.geometry.taps != R or self.geometry.tile not in OUTPUTS:
            return f"they compute F(m, 3) with m in {OUTPUTS}, not F({self.geometry.tile}, {self.geometry.taps})"
        if top != bottom or left != right:
            return f"the padding {self.geometry.padding} differs from side to side"
        return "its transforms are of points without a name" if self.points is None else None

    @property
    def sides(self) -> Pair:
        """The padding, of one that is the same on both sides."""
        return self.geometry.padding[0][0], self.geometry.padding[1][0]

    def fits(self, choice: str) -> bool:
        """Whether the kernel `choice` can compute this."""
        if choice == "torch":
            return True
        own = self.density < 1 if choice in SPARSE else WINOGRAD.get(choice, (0, ""))[0] == self.geometry.tile
        return own and self.hindrance is None

    def algorithm(self, choice: str) -> Algorithm:
        """Of a Winograd choice, on this processor. Raises: TersenetError where there are no kernels."""
        assert self.points is not None
        kept = choice if choice in SPARSE else WINOGRAD[choice][1]
        return Algorithm(self.geometry.tile, isa_of(kept), kept, self.points, self.relu, self.threshold)

    @cached_property
    def density(self) -> float:
        """Share of the weights that are not zero."""
        return density_of(self.weight)

    def blocks(self, width: int) -> float:
        """Share of the blocks of one input channel by `width` output channels that are not all zero."""
        outputs = self.weight.shape[2]
        padded = torch.nn.functional.pad(self.weight, (0, -outputs % width))
        return float((padded.unflatten(2, (-1, width)) != 0).any(3).double().mean())

    @property
    def shape(self) -> tuple[Any, ...]:
        """As of `Layer`; how much is pruned decides too. Where it is matters little: layers of one density share
        times."""
        kept = (round(self.density, 2), *(round(self.blocks(width), 2) for width in (4, 16)))
        what = (self.points, self.relu, self.threshold, self.geometry, kept)
        return (tuple(self.weight.shape), self.bias is not None, *what)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """(N, C_out, H', W') for an input of `size`."""
        return (size[0], self.weight.shape[2], self.geometry.out(size[2], 0), self.geometry.out(size[3], 1))

    @property
    def kind(self) -> str:
        """Such as `F(2, 3) relu 64 -> 128 + residual, relu`; the first ReLU is that of the Winograd domain."""
        inside = " relu" if self.relu else f" cut {self.threshold:g}" if self.threshold else ""
        text = f"F({self.geometry.tile}, {self.geometry.taps}){inside} {self.weight.shape[1]} -> {self.weight.shape[2]}"
        return text + _epilogue(self.residual, self.activation)


AnyLayer = Layer | DomainLayer | LinearLayer | IntegerLayer


def _epilogue(residual: bool, activation: str) -> str:
    return (" + residual" if residual else "") + (f", {activation}" if activation != "none" else "")


def is_generated(choice: str) -> bool:
    """Whether it is a kernel of ours."""
    return choice in (GEMM, INT8) or rounds_more(choice)


def rounds_more(choice: str) -> bool:
    """Whether its results are less exact than a plain convolution's."""
    return choice in (AMX, AMX_HALF) or choice in SPARSE or choice in WINOGRAD


def needs_amx(choice: str) -> bool:
    """Whether it is made for matrix tiles."""
    return AMX in choice.split()


def has_amx() -> bool:
    """Whether this process may use matrix tiles. Raises: TersenetError where there are no kernels at all."""
    return host().amx_problem is None


def has_half() -> bool:
    """Whether this processor's kernels read weights of 16 bits. Raises: TersenetError where there are no kernels."""
    return host().isa().has_half
