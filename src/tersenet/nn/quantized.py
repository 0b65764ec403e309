"""A convolution with fake-quantized input, weight and output: what stands beside Winograd layers."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.nn.group_shuffle import OrderedConv2d
from tersenet.nn.winograd_quantizer import FakeQuantizer, is_direct
from tersenet.nn.winograd_settings import Quantization

STAGES = ("input", "weight", "output")


class QuantizedConv2d(OrderedConv2d):
    """`nn.Conv2d` whose input, weight and output are fake-quantized, as in the Winograd-aware reference's baseline.

    Made by `from_conv`. Shapes: (N, C_in, H, W) -> (N, C_out, H', W').

    Source: Fernandez-Marques et al., MLSys 2020, arXiv 2002.10711.
    """

    quantization: Quantization
    quantizers: nn.ModuleDict

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, quantization: Quantization) -> Self:
        """The same convolution, with the very parameters of `conv`, its order of channels and its training mode.

        Raises: TersenetError for quantizers of what only a Winograd layer has, or of scales that this one has not.
        """
        given = {name for name in Quantization.model_fields if getattr(quantization, name) is not None}
        if not given or given - set(STAGES):
            raise TersenetError(f"a direct convolution quantizes {', '.join(STAGES)}, not {sorted(given) or 'nothing'}")
        made = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # pyright: ignore[reportArgumentType]
            conv.groups, conv.bias is not None, conv.padding_mode, device="meta", dtype=conv.weight.dtype,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        made.weight, made.bias = conv.weight, conv.bias
        made.take_order(conv)
        made.quantization = quantization
        made.quantizers = nn.ModuleDict()
        for name in STAGES:
            settings = getattr(quantization, name)
            if settings is None:
                continue
            per_filter = name == "weight" and settings.per == "channel"
            if settings.per != "tensor" and not per_filter:
                raise TersenetError(f"the {name} of a direct convolution has no scale per {settings.per}")
            shape = (conv.out_channels if per_filter else 1, 1, 1, 1)
            made.quantizers[name] = FakeQuantizer(settings, shape, name)
        if not conv.weight.is_meta:
            made.quantizers.to(conv.weight.device)
        return made.train(conv.training)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_direct():
            return super()._conv_forward(input, weight, bias)
        output = super()._conv_forward(self._rounded("input", input), self._rounded("weight", weight), bias)
        return self._rounded("output", output)

    def _rounded(self, name: str, values: Tensor) -> Tensor:
        return self.quantizers[name](values) if name in self.quantizers else values

    def check(self, name: str = "") -> None:
        """Raises: TersenetError, naming the layer, for ranges that are not finite. Once per epoch, not per batch."""
        for quantizer in self.quantizers.children():
            assert isinstance(quantizer, FakeQuantizer)
            try:
                quantizer.check()
            except TersenetError as error:
                raise TersenetError(f"{name or 'a quantized convolution'}: {error}") from None

    def extra_repr(self) -> str:
        bits = ", ".join(f"{name} {getattr(self.quantization, name).bits} bits" for name in self.quantizers)
        return f"{super().extra_repr()}, {bits}"
