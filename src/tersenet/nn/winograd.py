"""A convolution computed by Winograd's F(m, r), with what is needed to train it quantized."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.nn.group_shuffle import OrderedConv2d
from tersenet.nn.winograd_quantizer import FakeQuantizer, is_direct
from tersenet.nn.winograd_settings import Quantizer, WinogradSettings
from tersenet.nn.winograd_transforms import TransformMatrices
from tersenet.ops.fake_quantize import empty_range
from tersenet.ops.winograd import STAGES, Stages, winograd_conv2d
from tersenet.ops.winograd_tiles import Geometry


class WinogradConv2d(OrderedConv2d):
    """`nn.Conv2d` by F(m, r): the same arguments, weight, bias and, with exact transforms unquantized, the same output.

    Any kernel, size, stride, padding, dilation and groups. Only the input, the weight and small tensors are kept for
    backward. Quantizers follow their tensors' ranges in training mode and inside `calibration`, never else.

    Shapes: (N, C_in, H, W) -> (N, C_out, H', W').

    Differs from the reference layer: odd and unequal sizes, any padding, bias, groups, stride and dilation; the weight
    is as `nn.Conv2d` has it, so checkpoints go both ways; its F(6, 3) is a convolution.

    Raises:
        TersenetError: points or a scale that do not fit F(m, r); evaluation with quantizers that have seen nothing.

    Source: Fernandez-Marques et al., MLSys 2020, arXiv 2002.10711.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        settings: WinogradSettings | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.take_order()
        self.settings = settings or WinogradSettings()
        quantization = self.settings.quantization
        r = self.geometry.taps
        self.transforms = TransformMatrices(
            self.settings.tile, r, self.settings.points, self.settings.flex, quantization and quantization.transforms
        )
        found = {name: getattr(quantization, name) for name in STAGES} if quantization else {}
        self.quantizers = nn.ModuleDict(
            {name: FakeQuantizer(s, self._scales(name, s), _TITLES[name]) for name, s in found.items() if s}
        )
        # Of a layer without data these stay real: exact transforms follow from the settings, no file will fill them.
        where = None if self.weight.is_meta else self.weight.device
        for module in (self.transforms, self.quantizers):
            module.to(device=where, dtype=torch.promote_types(self.weight.dtype, torch.float32))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, settings: WinogradSettings | None = None) -> Self:
        """The same convolution, with the very parameters of `conv`, its order of channels and its training mode."""
        padding = conv.padding if isinstance(conv.padding, str) else _pair(conv.padding)
        made = cls(
            conv.in_channels, conv.out_channels, _pair(conv.kernel_size), _pair(conv.stride), padding,
            _pair(conv.dilation), conv.groups, conv.bias is not None, conv.padding_mode, settings,
            device="meta", dtype=conv.weight.dtype,
        )  # fmt: skip
        made.weight, made.bias = conv.weight, conv.bias
        made.take_order(conv)
        if not conv.weight.is_meta:
            for module in (made.transforms, made.quantizers):
                module.to(conv.weight.device)
        return made.train(conv.training)

    @property
    def geometry(self) -> Geometry:
        """Where the taps of the filter lie. Other padding than zeros is added before."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        zeros = self.padding_mode == "zeros"
        return Geometry(
            tile=self.settings.tile,
            kernel=_pair(self.kernel_size),
            stride=_pair(self.stride),
            padding=((top, bottom), (left, right)) if zeros else ((0, 0), (0, 0)),
            dilation=_pair(self.dilation),
            groups=self.groups,
        )

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_direct():
            return super()._conv_forward(input, weight, bias)
        if input.dim() == 3:
            return self._conv_forward(input[None], weight, bias)[0]
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise TersenetError(
                f"a Winograd convolution of in_channels (={self.in_channels}) got an input {tuple(input.shape)}"
            )
        if self.padding_mode != "zeros":
            input = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        stages = {name: self._quantizer(name).stage() for name in self.quantizers}
        y, ranges = winograd_conv2d(
            input,
            weight,
            bias,
            self.transforms.squares(torch.promote_types(input.dtype, torch.float32)),
            self.geometry,
            Stages(**{name: stage for name, (stage, _) in stages.items()}),
            [stages[name][1] if name in stages else None for name in STAGES],
        )
        for name, found in zip(STAGES, ranges, strict=True):
            if found is not None:
                self._quantizer(name).observed(found)
        return y

    def check(self, name: str = "") -> None:
        """Raises: TersenetError, naming the layer, for transforms trained into something singular or ranges not finite.

        It reads values from the device: call it once per epoch, not per batch.
        """
        try:
            self.transforms.check()
            for stage in self.quantizers:
                self._quantizer(stage).check()
        except TersenetError as error:
            raise TersenetError(f"{name or 'a Winograd convolution'}: {error}") from None

    def extra_repr(self) -> str:
        exact = self.transforms.exact
        return f"{super().extra_repr()}, F({exact.m}, {exact.r}), {self.settings.flex}"

    def _quantizer(self, name: str) -> FakeQuantizer:
        module = self.quantizers[name]
        assert isinstance(module, FakeQuantizer)
        return module

    def _scales(self, name: str, settings: Quantizer) -> tuple[int, ...]:
        """The shape of the scales of one tensor. Raises: TersenetError if the tensor has no such axis."""
        taps = (self.settings.tile + self.geometry.taps - 1) ** 2
        phases = self.geometry.axis(0)[1] * self.geometry.axis(1)[1]
        channels = (
            self.in_channels // self.groups * phases if name == "input_winograd" else self.out_channels // self.groups
        )
        winograd = {"tap": (taps, 1, 1, 1), "tap_channel": (taps, self.groups, 1, channels)}
        known = winograd if name in ("input_winograd", "weight_winograd", "product") else {}
        if name == "weight":
            known = {"channel": (self.out_channels, 1, 1, 1)}
        known = {"tensor": (1, 1, 1, 1)} | known
        if settings.per not in known:
            raise TersenetError(f"the {_TITLES[name]} has one scale per {' or '.join(known)}, not per {settings.per}")
        return known[settings.per]


_TITLES = {
    "input": "input",
    "weight": "weight",
    "input_winograd": "transformed input",
    "weight_winograd": "transformed weight",
    "product": "product",
    "output": "output",
}


@contextmanager
def calibration(model: nn.Module) -> Generator[None]:
    """Inside, every quantizer's range becomes that of all batches that are run, in evaluation mode too.

    Run a few batches under `torch.no_grad()`. A quantizer that no batch reached keeps what it had.
    """
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
    before: list[tuple[Any, bool]] = [(quantizer.range.clone(), quantizer.seen) for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.range.copy_(empty_range(quantizer.rounding.shape))
            quantizer.calibrating, quantizer.seen = True, False
        yield
    finally:
        for quantizer, (values, seen) in zip(quantizers, before, strict=True):
            quantizer.calibrating = False
            if not quantizer.seen:
                quantizer.range.copy_(values)
                quantizer.seen = seen


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    height, width = values
    return height, width
