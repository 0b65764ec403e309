"""Integers that stand for a tensor, each times a scale: what quantized layers hold for inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersenet.nn.switch import Switch
from tersenet.ops.fake_quantize import Rounding, round_to

_switch = Switch("rounding as operators")
as_operators = _switch.on
"""Inside, rounding to 16 bits or fewer is one operator of its own in each direction, which a converter can name."""


@torch.library.custom_op("tersenet::quantize_linear", mutates_args=())
def quantize_linear(values: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    """ONNX's QuantizeLinear: round(values / scale), ties to even, saturated in the type of `zero`."""
    limits = torch.iinfo(zero.dtype)
    return (values / _along(scale, values, axis)).round_().clamp_(limits.min, limits.max).to(zero.dtype)


@quantize_linear.register_fake
def _(values: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    return torch.empty_like(values, dtype=zero.dtype)


@torch.library.custom_op("tersenet::dequantize_linear", mutates_args=())
def dequantize_linear(levels: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    """ONNX's DequantizeLinear: levels * scale."""
    return levels.to(scale.dtype) * _along(scale, levels, axis)


@dequantize_linear.register_fake
def _(levels: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    return torch.empty_like(levels, dtype=scale.dtype)


def _along(scale: Tensor, values: Tensor, axis: int) -> Tensor:
    return scale if scale.dim() == 0 else scale.view(-1, *[1] * (values.dim() - axis - 1))


class Levels(nn.Module):
    """How a tensor is rounded, for good: forward(values) -> the nearest of 2^bits values.

    scale: () or, with one scale for each place on `axis`, (n,). Where scales differ along two axes, `factor` holds them
        in the shape that broadcasts, and `scale` is 1.
    zero: zeros of the integers' type and the scale's shape: int8 up to 8 bits, int16 up to 16, int32 above.
    """

    scale: Tensor
    zero: Tensor
    factor: Tensor | None

    def __init__(self, rounding: Rounding, scale: Tensor) -> None:
        super().__init__()
        self.rounding = rounding
        scale = scale.detach().to(torch.promote_types(scale.dtype, torch.float32))
        scale = scale.broadcast_to(rounding.shape).clone()
        wide = [axis for axis, size in enumerate(rounding.shape) if size > 1]
        self.axis = wide[0] if len(wide) == 1 else 0
        factor = scale if len(wide) > 1 else None
        flat = scale.new_ones(()) if factor is not None else scale.flatten() if wide else scale.reshape(())
        bits = rounding.bits
        dtype = torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32
        self.register_buffer("scale", flat)
        self.register_buffer("factor", factor)
        self.register_buffer("zero", torch.zeros_like(flat, dtype=dtype))

    @property
    def whole(self) -> Tensor:
        """The scales in the shape that broadcasts against the values."""
        return self.scale.view(self.rounding.shape) if self.factor is None else self.factor

    def integers(self, values: Tensor) -> Tensor:
        """The levels of `values`, from -2^(bits - 1) to 2^(bits - 1) - 1."""
        low, high = self.rounding.lowest, self.rounding.highest
        if not _switch.is_on():
            return (values / self.whole).round_().clamp_(low, high).to(self.zero.dtype)
        if self.factor is not None:
            values = values / self.factor
        if low > torch.iinfo(self.zero.dtype).min:
            scale = _along(self.scale, values, self.axis)
            values = torch.minimum(torch.maximum(values, low * scale), high * scale)
        return quantize_linear(values, self.scale, self.zero, self.axis)

    def values(self, levels: Tensor) -> Tensor:
        """The numbers that levels stand for."""
        if not _switch.is_on() or self.rounding.bits > 16:
            return levels.to(self.scale.dtype) * self.whole
        found = dequantize_linear(levels, self.scale, self.zero, self.axis)
        return found if self.factor is None else found * self.factor

    def forward(self, values: Tensor) -> Tensor:
        # As `FakeQuantizer`: in 16 bits a small scale would be zero.
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        if not _switch.is_on() or self.rounding.bits > 16:
            return round_to(wide, self.whole, self.rounding).to(values.dtype)
        return self.values(self.integers(wide)).to(values.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.rounding.bits}, scales={self.whole.numel()}"
