"""Quantized layers for inference: weights transformed and rounded once, kept as integers beside their scales."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.nn.adapter import select_channels
from tersenet.nn.group_shuffle import OrderedConv2d
from tersenet.nn.levels import Levels
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.quantized_operator import QuantizedConvolution, called, is_operator
from tersenet.nn.winograd import WinogradConv2d
from tersenet.nn.winograd_quantizer import FakeQuantizer
from tersenet.ops.fake_quantize import Rounding, round_to
from tersenet.ops.winograd import assembled, products, transformed
from tersenet.ops.winograd_tiles import Geometry, input_tiles, reach, weight_taps

_ROUNDED = ("input", "input_winograd", "product", "output")


class FoldedLayer(nn.Module, ABC):
    """What folded layers share: `compute` between the orders of channels that the layer has. See `OrderedConv2d`."""

    gather: Tensor | None
    scatter: Tensor | None

    def take(self, layer: OrderedConv2d) -> None:
        self.register_buffer("gather", layer.gather)
        self.register_buffer("scatter", layer.scatter)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.gather is None else select_channels(x, 1, self.gather)
        y = self.compute(x)
        return y if self.scatter is None else select_channels(y, 1, self.scatter)

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """The layer's own result, in its own orders."""


class FoldedConv2d(FoldedLayer):
    """A `QuantizedConv2d` with its weight as integers. Shapes: (N, C_in, H, W) -> (N, C_out, H', W').

    weight: (C_out, C_in / groups, kH, kW), integers; floating point if the weight is not quantized.
    """

    weight: Tensor
    bias: Tensor | None
    input: Levels | None
    output: Levels | None

    def __init__(self, layer: QuantizedConv2d) -> None:
        super().__init__()
        _start(self, layer)
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        left, right, top, bottom = edges_of(layer)
        # What a convolution can pad by itself is left to it.
        even = layer.padding_mode == "zeros" and left == right and top == bottom
        self.padding = (top, left) if even else (0, 0)
        self.edges = (0, 0, 0, 0) if even else (left, right, top, bottom)
        self.padding_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        _quantizers(self, layer, ("input", "output"))
        weight = layer.weight.detach()
        self.weight_levels = _levels(layer.quantizers["weight"]) if "weight" in layer.quantizers else None
        self.register_buffer("weight", weight if self.weight_levels is None else self.weight_levels.integers(weight))

    def compute(self, x: Tensor) -> Tensor:
        if any(self.edges):
            x = nn.functional.pad(x, self.edges, mode=self.padding_mode)
        if is_operator():
            return called(self.as_convolution(), x)
        x = _rounded(self.input, x)
        weight = self.weight if self.weight_levels is None else self.weight_levels.values(self.weight).to(x.dtype)
        y = nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return _rounded(self.output, y)

    def as_convolution(self) -> QuantizedConvolution:
        """What it computes once its own padding is around the input."""
        rows, columns = self.padding
        return QuantizedConvolution(
            self.weight, _scale(self.weight_levels), self.bias, input=_scale(self.input), output=_scale(self.output),
            bits=_bits(self.input, None, None, self.output, self.weight_levels), kernel=self.weight.shape[2:],
            stride=self.stride, padding=(rows, rows, columns, columns), dilation=self.dilation, groups=self.groups,
        )  # fmt: skip


class FoldedWinogradConv2d(FoldedLayer):
    """A quantized `WinogradConv2d` with its transformed weight as integers: bit-equal to it in evaluation mode.

        V = input_winograd(BB tiles(input(x)))    M = product(V weight)    y = output(AA M + bias)

    weight: (t t, groups, C', C_out / groups), integers of `weight_winograd`; tap t i + j is row i, column j of a tile.
        C' are the input channels of a group, times the phases of a stride. Floating point if it is not quantized.
    at (m, t), bt (t, t): A^T and B^T as nested lists, as rounded as they were in the layer.
    aa (m m, t t), bb (t t, t t): their Kronecker squares.
    input, input_winograd, weight_winograd, product, output: `Levels`, or None where nothing is rounded. `scale` of one
        scale per tap is (t t,).

    Shapes: (N, C_in, H, W) -> (N, C_out, H', W').
    """

    weight: Tensor
    bias: Tensor | None
    aa: Tensor
    bb: Tensor
    input: Levels | None
    input_winograd: Levels | None
    product: Levels | None
    output: Levels | None

    def __init__(self, layer: WinogradConv2d) -> None:
        super().__init__()
        _start(self, layer)
        self.settings = layer.settings
        self.geometry: Geometry = layer.geometry
        self.edges = (0, 0, 0, 0) if layer.padding_mode == "zeros" else edges_of(layer)
        self.padding_mode = layer.padding_mode
        _quantizers(self, layer, _ROUNDED)
        with torch.no_grad():
            weight = layer.weight.detach().to(torch.promote_types(layer.weight.dtype, torch.float32))
            at, _, bt = layer.transforms(weight.dtype)
            if "weight" in layer.quantizers:
                first = _levels(layer.quantizers["weight"])
                weight = round_to(weight, first.whole.to(weight.dtype), first.rounding)
            squares = layer.transforms.squares(weight.dtype)
            taps = transformed(squares.gg, weight_taps(weight, self.geometry))
            found = "weight_winograd" in layer.quantizers
            self.weight_winograd = _levels(layer.quantizers["weight_winograd"]) if found else None
            self.register_buffer(
                "weight", taps if self.weight_winograd is None else self.weight_winograd.integers(taps)
            )
            self.at, self.bt = at.tolist(), bt.tolist()
            self.register_buffer("aa", squares.aa)
            self.register_buffer("bb", squares.bb)

    def compute(self, x: Tensor) -> Tensor:
        if any(self.edges):
            x = nn.functional.pad(x, self.edges, mode=self.padding_mode)
        if is_operator() and x.dtype == self.bb.dtype:
            return called(self.as_convolution(), x)
        n, _, h, w = x.shape
        at, kind, x = self.geometry, x.dtype, x.to(self.bb.dtype)
        (top, _), (left, _) = at.padding
        # Not `padded_image`, which writes into a tensor: converters make much of that.
        edges = (left, reach(at, w, 1) - left - w, top, reach(at, h, 0) - top - h)
        v = transformed(self.bb, input_tiles(nn.functional.pad(_rounded(self.input, x), edges), at))
        u = self.weight if self.weight_winograd is None else self.weight_winograd.values(self.weight)
        m = _rounded(self.product, products(_rounded(self.input_winograd, v), u))
        y = assembled(self.aa, m, None, at, (n, h, w), False)
        y = y if self.bias is None else y + self.bias.view(-1, 1, 1)
        return _rounded(self.output, y).to(kind).contiguous()

    def as_convolution(self) -> QuantizedConvolution:
        """What it computes once its own padding is around the input."""
        own = self.geometry
        at, bt = ([number for row in matrix for number in row] for matrix in (self.at, self.bt))
        return QuantizedConvolution(
            self.weight, _scale(self.weight_winograd), self.bias, input=_scale(self.input),
            transformed=_scale(self.input_winograd), product=_scale(self.product), output=_scale(self.output),
            aa=self.aa, bb=self.bb, at=at, bt=bt, kernel=own.kernel, stride=own.stride, dilation=own.dilation,
            bits=_bits(self.input, self.input_winograd, self.product, self.output, self.weight_winograd),
            padding=(*own.padding[0], *own.padding[1]), groups=own.groups,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"F({self.geometry.tile}, {self.geometry.taps}), weight={tuple(self.weight.shape)}"


def fold(layer: nn.Conv2d) -> nn.Module:
    """What `layer` computes in evaluation mode, with nothing left to train: a quantized layer folded; a Winograd layer
    in floating point as the convolution that it is, if its transforms are exact; any other layer itself.

    Raises: TersenetError for quantizers that have seen nothing.
    """
    if isinstance(layer, QuantizedConv2d):
        return FoldedConv2d(layer).eval()
    if not isinstance(layer, WinogradConv2d):
        return layer
    if layer.settings.quantization is not None:
        return FoldedWinogradConv2d(layer).eval()
    return layer if layer.settings.flex == "full" else plain(layer)


def plain(layer: nn.Conv2d, name: str = "") -> nn.Conv2d:
    """The convolution that a Winograd or quantized layer stands for, without any rounding, with its very parameters.

    Raises: TersenetError, naming the layer, for transforms that were trained freely: they make no convolution.
    """
    if isinstance(layer, WinogradConv2d) and layer.settings.flex == "full":
        raise TersenetError(
            f"{name or 'the layer'} has transforms that were trained freely (flex: full), which is no convolution any "
            "more: train with `flex: diagonal`, `points` or `static`, or keep the Winograd layer"
        )
    ordered = isinstance(layer, OrderedConv2d) and (layer.gather is not None or layer.scatter is not None)
    made = (OrderedConv2d if ordered else nn.Conv2d)(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,  # pyright: ignore[reportArgumentType]
        layer.groups, layer.bias is not None, layer.padding_mode, device="meta", dtype=layer.weight.dtype,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    made.weight, made.bias = layer.weight, layer.bias
    if isinstance(made, OrderedConv2d):
        made.take_order(layer)
    return made.train(layer.training)


def edges_of(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Columns left and right, rows above and below, that the layer pads its input with."""
    if layer.padding == "same":
        whole = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        (top, bottom), (left, right) = ((size // 2, size - size // 2) for size in whole)
        return left, right, top, bottom
    rows, columns = (0, 0) if isinstance(layer.padding, str) else (int(layer.padding[0]), int(layer.padding[1]))
    return columns, columns, rows, rows


def _start(folded: FoldedLayer, layer: WinogradConv2d | QuantizedConv2d) -> None:
    layer.eval()
    folded.take(layer)
    folded.register_buffer("bias", None if layer.bias is None else layer.bias.detach())


def _quantizers(folded: nn.Module, layer: QuantizedConv2d | WinogradConv2d, names: tuple[str, ...]) -> None:
    for name in names:
        folded.add_module(name, _levels(layer.quantizers[name]) if name in layer.quantizers else None)


def _levels(quantizer: nn.Module) -> Levels:
    assert isinstance(quantizer, FakeQuantizer)
    stage, scale = quantizer.stage()
    rounding = Rounding(stage.rounding.bits, stage.rounding.shape, stage.rounding.power_of_two)
    return Levels(rounding, scale)


def _rounded(levels: Levels | None, values: Tensor) -> Tensor:
    return values if levels is None else levels(values)


def _scale(levels: Levels | None) -> Tensor | None:
    return None if levels is None else levels.whole


def _bits(*stages: Levels | None) -> list[int]:
    return [0 if levels is None else levels.rounding.bits for levels in stages]
