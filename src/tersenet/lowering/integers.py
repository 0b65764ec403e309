"""Quantized layers of the lowered network: what they compute, and whether 8-bit integers can."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from tersenet.errors import TersenetError
from tersenet.kernels.int8 import Int8
from tersenet.kernels.int8_pack import Integers, Level, Moves
from tersenet.kernels.int8_winograd import PLACES
from tersenet.lowering.program import attribute, constant
from tersenet.nn.quantized_operator import STAGES, QuantizedConvolution
from tersenet.ops.fake_quantize import Rounding

INT8 = "int8"
"""The choice that is the generated kernels in integers."""
_BITS, _WIDE_BITS = 8, 16
"""Of what is multiplied; of sums of products and outputs, whose levels float32 has exactly."""
_TENSORS = ("weight", "scale", "bias", "factor", "summand", *STAGES, "aa", "bb")


@dataclass(frozen=True)
class IntegerLayer:
    """activation(`computes` + residual). `reuse`: as of `Layer`."""

    name: str
    computes: QuantizedConvolution = field(repr=False)
    residual: bool
    activation: str
    reuse: bool = False

    @property
    def hindrance(self) -> str | None:
        """Why there are no generated kernels for it; None if there are."""
        own = self.computes
        stages = ("input", "transformed") if own.bt else ("input",)
        bits = dict(zip((*STAGES, "weight"), own.bits, strict=True))
        for name in (*stages, "weight"):
            if not 0 < bits[name] <= _BITS:
                found = f"has {bits[name]} bits" if bits[name] else "is not rounded"
                return f"its {_TITLES[name]} {found}, and they multiply numbers of at most {_BITS}"
        for name in ("product", "output"):
            if bits[name] > _WIDE_BITS:
                return f"its {_TITLES[name]} has {bits[name]} bits, of at most {_WIDE_BITS}"
        if own.groups > 1:
            return f"it has {own.groups} groups of channels"
        if own.transformed is not None and own.transformed.shape[3] > 1:
            return "its transformed input has a scale for each channel, which no sum over channels in integers can have"
        geometry = own.geometry
        if own.bt and (len(own.bt) > PLACES or max(*geometry.stride, *geometry.dilation) > 1):
            return "a Winograd layer has a stride, a dilation or tiles larger than 8 x 8"
        try:
            self.algorithm(INT8)
        except TersenetError as error:
            return str(error)
        return None

    def fits(self, choice: str) -> bool:
        """Whether the kernel `choice` can compute this."""
        return choice == "torch" or (choice == INT8 and self.hindrance is None)

    def algorithm(self, choice: str) -> Int8:
        """Its code. Raises: TersenetError where this processor has no kernels for it."""
        return self.integers.algorithm()

    @property
    def integers(self) -> Integers:
        """As the kernels take it."""
        own = self.computes
        assert own.scale is not None
        scale, weight, at, bt = own.scale.double(), own.weight, None, None
        if own.bt:
            t = round(len(own.bt) ** 0.5)
            weight, scale = weight[:, 0], scale[:, 0, 0]
            at, bt = (torch.tensor(list(one), dtype=torch.float64).view(-1, t) for one in (own.at, own.bt))
        else:
            weight, scale = weight.flatten(2).permute(2, 1, 0), scale.view(1, -1)
        levels = [self._level(name) for name in STAGES]
        first, transformed, product, output = levels
        assert first is not None
        return Integers(
            weight, scale, own.bias, own.factor, own.summand, first, output, at, bt, transformed, product
        )  # fmt: skip

    def _level(self, name: str) -> Level | None:
        scale: Tensor | None = getattr(self.computes, name)
        if scale is None:
            return None
        rounding = Rounding(self.computes.bits[STAGES.index(name)], ())
        scale = scale.double()
        scale = scale[:, 0, 0] if name in ("transformed", "product") else scale.reshape(())
        return Level(scale, rounding.lowest, rounding.highest)

    @property
    def moves(self) -> Moves:
        """Of the convolution."""
        geometry, (top, bottom, left, right) = self.computes.geometry, self.computes.padding
        return Moves(geometry.kernel, geometry.stride, (top, bottom, left, right), geometry.dilation)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Everything that decides about times, but for the input and the epilogue; not the weights' values."""
        own = self.computes
        scales = [None if one is None else tuple(one.shape) for one in (own.scale, *(getattr(own, n) for n in STAGES))]
        return ("integers", tuple(own.weight.shape), own.bias is not None, scales, own.geometry)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """(N, C_out, H', W') for an input of `size`."""
        return self.computes.output_size(size)

    @property
    def kind(self) -> str:
        """Such as `8 bits F(4, 3) 64 -> 128 + residual, relu`."""
        own, at = self.computes, self.computes.geometry
        inputs, outputs = own.weight.shape[2:] if own.bt else own.weight.shape[1::-1]
        what = f"F({own.tile}, {at.taps})" if own.bt else f"{at.kernel[0]}x{at.kernel[1]}"
        text = f"{own.bits[-1] or 32} bits {what} {inputs * own.groups} -> {outputs * (own.groups if own.bt else 1)}"
        text += f" /{at.stride[0]}" if max(at.stride) > 1 else ""
        text += f" groups {at.groups}" if at.groups > 1 else ""
        return text + (" + residual" if self.residual else "") + f", {self.activation}" * (self.activation != "none")


_TITLES = {
    "input": "input", "transformed": "transformed input", "weight": "weight", "product": "product", "output": "output"
}  # fmt: skip


def integers_at(made: fx.GraphModule, node: fx.Node) -> Callable[..., IntegerLayer] | None:
    """The layer of an operator's call but for what follows it; None where a tensor of it is computed of the input."""
    found = convolution_at(made, node)
    return None if found is None else partial(IntegerLayer, computes=found)


def convolution_at(made: fx.GraphModule, node: fx.Node) -> QuantizedConvolution | None:
    """What an operator's call computes."""
    names = [one.name for one in fields(QuantizedConvolution)]
    given: dict[str, Any] = dict(zip(names, node.args[1:], strict=True))
    for name in _TENSORS:
        value = constant(made, given[name])
        if (value is None) != (given[name] is None):
            return None
        given[name] = value
    return QuantizedConvolution(**given)


def rescaled(made: fx.GraphModule, node: fx.Node, scale: Tensor, shift: Tensor) -> bool:
    """Make result * scale + shift (C_out,) part of an operator's call; whether that was possible."""
    found = convolution_at(made, node)
    if found is None:
        return False
    factor = scale if found.factor is None else found.factor.double() * scale
    summand = shift if found.summand is None else found.summand.double() * scale + shift
    new = replace(found, factor=factor.float(), summand=summand.float())
    places = [one.name for one in fields(new)]
    args = list(node.args)
    for name in ("factor", "summand"):
        args[1 + places.index(name)] = attribute(made, getattr(new, name), node)
    node.args = tuple(args)
    return True
