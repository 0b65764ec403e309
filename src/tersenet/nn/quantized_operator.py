"""A folded quantized layer as one operator: what `lower` finds in an exported graph.

The operator computes what the folded layer computes, bit for bit. Nothing but lowering switches it on, so exported
programs stay free of operators of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tersenet.nn.switch import Switch
from tersenet.ops.fake_quantize import Rounding, round_to
from tersenet.ops.winograd import assembled, products, transformed
from tersenet.ops.winograd_tiles import Geometry, input_tiles, reach

STAGES = ("input", "transformed", "product", "output")


_switch = Switch("quantized layers as operators")
is_operator = _switch.is_on
as_operator = _switch.on
"""Inside, every folded quantized layer that this thread calls is one call of the operator."""


@dataclass(frozen=True)
class QuantizedConvolution:
    """What a folded layer computes, in the order of the operator's arguments:

        direct: y = output(conv2d(input(x), weight * scale) + bias)
        Winograd: V = transformed(BB tiles(input(x)))    y = output(AA product(V (weight * scale)) + bias)
        then y * factor + summand

    weight: (C_out, C_in / groups, kH, kW), or (t t, groups, C', C_out / groups) for Winograd; levels if there is a
        `scale`, which broadcasts against it.
    input, transformed, product, output: scales that broadcast against their tensors, see `winograd.STAGES`; None where
        nothing is rounded. `bits` has theirs, in that order, and then the weight's; 0 where there are none.
    bias, factor, summand: (C_out,) or None.
    aa (m m, t t), bb (t t, t t): for Winograd. `at` (m t numbers), `bt` (t t): A^T and B^T, row by row.
    padding: zeros (top, bottom, left, right).
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    factor: Tensor | None = None
    summand: Tensor | None = None
    input: Tensor | None = None
    transformed: Tensor | None = None
    product: Tensor | None = None
    output: Tensor | None = None
    aa: Tensor | None = None
    bb: Tensor | None = None
    bits: Sequence[int] = (0, 0, 0, 0, 0)
    at: Sequence[float] = ()
    bt: Sequence[float] = ()
    kernel: Sequence[int] = (1, 1)
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0, 0, 0)
    dilation: Sequence[int] = (1, 1)
    groups: int = 1

    @property
    def tile(self) -> int:
        """m of F(m, r), or 1 for a direct convolution."""
        return round(len(self.at) / len(self.bt) ** 0.5) if self.bt else 1

    @property
    def geometry(self) -> Geometry:
        top, bottom, left, right = self.padding
        pairs = ((int(one[0]), int(one[1])) for one in (self.kernel, self.stride, self.dilation))
        kernel, stride, dilation = pairs
        return Geometry(self.tile, kernel, stride, ((top, bottom), (left, right)), dilation, self.groups)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """(N, C_out, H', W') for an input of `size`."""
        channels = self.weight.shape[0] if not self.bt else self.weight.shape[1] * self.weight.shape[3]
        return (size[0], channels, self.geometry.out(size[2], 0), self.geometry.out(size[3], 1))

    def double(self) -> QuantizedConvolution:
        """The same in float64."""
        tensors = {one.name: getattr(self, one.name) for one in fields(self)}
        wide = {name: t.double() for name, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point()}
        return replace(self, **wide)

    def compute(self, x: Tensor) -> Tensor:
        """x (N, C_in, H, W) -> (N, C_out, H', W'), in the memory order of x."""
        nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        y = self._winograd(x) if self.bt else self._direct(x)
        y = self._rounded("output", y)
        y = y if self.factor is None else y * self.factor.view(-1, 1, 1)
        y = y if self.summand is None else y + self.summand.view(-1, 1, 1)
        return y.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)

    def _direct(self, x: Tensor) -> Tensor:
        x = self._rounded("input", x)
        top, bottom, left, right = self.padding
        even = top == bottom and left == right
        x = x if even else pad(x, (left, right, top, bottom))
        moves = (list(self.stride), [top, left] if even else [0, 0], list(self.dilation), self.groups)
        return conv2d(x, self._weight(), self.bias, *moves)

    def _winograd(self, x: Tensor) -> Tensor:
        assert self.aa is not None
        assert self.bb is not None
        at, (n, _, h, w) = self.geometry, x.shape
        (top, _), (left, _) = at.padding
        edges = (left, reach(at, w, 1) - left - w, top, reach(at, h, 0) - top - h)
        v = transformed(self.bb, input_tiles(pad(self._rounded("input", x), edges), at))
        m = self._rounded("product", products(self._rounded("transformed", v), self._weight()))
        y = assembled(self.aa, m, None, at, (n, h, w), False)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def _weight(self) -> Tensor:
        return self.weight if self.scale is None else self.weight.to(self.scale.dtype) * self.scale

    def _rounded(self, name: str, values: Tensor) -> Tensor:
        scale: Tensor | None = getattr(self, name)
        if scale is None:
            return values
        return round_to(values, scale, Rounding(self.bits[STAGES.index(name)], tuple(scale.shape)))


_KINDS = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "Sequence[int]": "int[]", "Sequence[float]": "float[]"}
_ARGUMENTS = ", ".join(f"{_KINDS.get(str(one.type), one.type)} {one.name}" for one in fields(QuantizedConvolution))


def _run(x: Tensor, *arguments: Any) -> Tensor:
    return QuantizedConvolution(*arguments).compute(x)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    order = torch.channels_last if nhwc else torch.contiguous_format
    shape = QuantizedConvolution(*arguments).output_size(x.shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)


_library = torch.library.Library("tersenet", "FRAGMENT")
_library.define(f"quantized_conv2d(Tensor x, {_ARGUMENTS}) -> Tensor")
_library.impl("quantized_conv2d", _run, "CompositeExplicitAutograd")
torch.library.register_fake("tersenet::quantized_conv2d", _fake, lib=_library)

OPERATOR = torch.ops.tersenet.quantized_conv2d.default
"""As it stands in a graph."""


def called(layer: QuantizedConvolution, x: Tensor) -> Tensor:
    """`layer.compute` by the operator."""
    return OPERATOR(x, *(getattr(layer, one.name) for one in fields(layer)))
