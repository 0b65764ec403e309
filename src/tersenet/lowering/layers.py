"""A convolution with what follows it, and the kernels that can compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode as _mode  # pyright: ignore[reportPrivateUsage]

from tersenet.kernels import threads
from tersenet.kernels.generate import Algorithm, R
from tersenet.kernels.host import host
from tersenet.kernels.operator import winograd_conv2d
from tersenet.kernels.pack import pack
from tersenet.kernels.winograd import BOUNDS, Call, Tables
from tersenet.kernels.winograd import call as prepared

Pair = tuple[int, int]


@dataclass(frozen=True)
class _Activation:
    function: Callable[[Tensor], Tensor]  # in place
    onednn: str
    scalars: tuple[float, ...] = ()


ACTIVATIONS = {
    "none": _Activation(lambda x: x, "none"),
    "relu": _Activation(torch.relu_, "relu"),
    "relu6": _Activation(lambda x: F.hardtanh_(x, 0.0, 6.0), "hardtanh", (0.0, 6.0)),
    "silu": _Activation(lambda x: F.silu(x, inplace=True), "swish"),
    "hardswish": _Activation(lambda x: F.hardswish(x, inplace=True), "hardswish"),
}


@dataclass(frozen=True)
class Layer:
    """activation(conv2d(x, weight, bias) + residual). `weight` (C_out, C_in / groups, kH, kW), `bias` (C_out,)."""

    name: str
    weight: Tensor = field(repr=False)
    bias: Tensor | None = field(repr=False)
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    residual: bool
    activation: str

    @property
    def fits_winograd(self) -> bool:
        plain = self.stride == self.dilation == (1, 1) and self.groups == 1
        return plain and tuple(self.weight.shape[2:]) == (R, R)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """(N, C_out, H', W') for an input of `size`."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        image = [
            (length + 2 * pad - r) // step + 1
            for length, pad, r, step in zip(size[2:], self.padding, reach, self.stride, strict=True)
        ]
        return (size[0], self.weight.shape[0], *image)

    @property
    def kind(self) -> str:
        """Such as `3x3 64 -> 128 /2 + residual, relu`."""
        outputs, inputs, *kernel = self.weight.shape
        text = f"{kernel[0]}x{kernel[1]} {inputs * self.groups} -> {outputs}"
        text += f" /{self.stride[0]}" if max(self.stride) > 1 else ""
        text += f" groups {self.groups}" if self.groups > 1 else ""
        text += " + residual" if self.residual else ""
        return text + (f", {self.activation}" if self.activation != "none" else "")


class TorchConvolution(nn.Module):
    """Plain torch, weights in channels-last memory."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", layer.bias)
        self._settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self._activation = ACTIVATIONS[layer.activation].function

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, *self._settings)
        return self._activation(y if residual is None else y.add_(residual))


class DirectConvolution(nn.Module):
    """oneDNN's convolution with its weight packed once, bias, sum and activation in one pass."""

    def __init__(self, layer: Layer, size: tuple[int, ...]) -> None:
        super().__init__()
        weight = layer.weight.contiguous().to_mkldnn()
        settings = (layer.padding, layer.stride, layer.dilation, layer.groups)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # pyright: ignore
        # Not a buffer: a packed tensor can be neither moved nor saved.
        self._weight = reorder(weight, *settings, list(size))
        self._bias = layer.bias
        self._settings = tuple(list(one) if isinstance(one, tuple) else one for one in settings)
        activation = ACTIVATIONS[layer.activation]
        # With a sum, oneDNN's operator knows no activation but ReLU.
        self._apart = layer.residual and layer.activation not in ("none", "relu")
        self._function = activation.function
        self._post = (activation.onednn, list(activation.scalars), "")
        unary = "relu" if layer.activation == "relu" else None
        self._binary = ("add", 1.0, unary, [], "")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        run = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return run.default(x, self._weight, self._bias, *self._settings, *self._post)
        y = run.binary(x, residual, self._weight, self._bias, *self._settings, *self._binary)
        return self._function(y) if self._apart else y

    def __deepcopy__(self, memo: dict[int, Any]) -> DirectConvolution:
        return self  # it never changes


def _watched(x: Tensor) -> bool:
    """Whether somebody looks at operators, or `x` is no plain tensor: then it has to be an operator of torch."""
    watched = torch.compiler.is_compiling() or torch.is_grad_enabled() or _mode() is not None
    return watched or type(x) is not Tensor


def _key(x: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
    """What decides whether an earlier check, and what was worked out then, holds."""
    other = None if residual is None else (residual.dtype, residual.device, residual.shape, residual.stride())
    return x.dtype, x.device, x.shape, x.stride(), other, torch.get_num_threads()


class WinogradConvolution(nn.Module):
    """The generated kernels, with their weight packed once. The way through torch's operator takes longer than a small
    layer, and is taken once for each size."""

    def __init__(self, layer: Layer, m: int, half: bool) -> None:
        super().__init__()
        self._packed = pack(layer.weight, layer.bias, m, half=half)
        self._padding = layer.padding
        self._function = None if layer.activation in BOUNDS else ACTIVATIONS[layer.activation].function
        self._activation = layer.activation if self._function is None else "none"
        self._tables = Tables(self._packed.weight, self._packed.bias)
        self._calls: dict[tuple[Any, ...] | None, Call] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        key = None if _watched(x) else _key(x, residual)
        call = self._calls.get(key)
        if call is not None:
            y = call.run(x, self._tables, residual)
        else:
            y = winograd_conv2d(x, self._packed, self._padding, residual, self._activation)
            if key is not None and x.stride(1) == 1 and (residual is None or residual.stride(1) == 1):
                self._calls[key] = self._call(x, residual)
        return y if self._function is None else self._function(y)

    def _call(self, x: Tensor, residual: Tensor | None) -> Call:
        strides = None if residual is None else residual.stride()
        packed, count = self._packed, threads.available()
        settings = (self._padding, packed.out_channels, self._activation, count)
        return prepared(packed.algorithm, x.shape, x.stride(), strides, *settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> WinogradConvolution:
        return self  # it never changes


WINOGRAD = {"F2": (2, False), "F4": (4, False), "F6": (6, False), "F2 half": (2, True), "F4 half": (4, True)}
"""Choice -> m, and whether the packed weight is kept in 16 bits."""
CHOICES = ("torch", "direct", *WINOGRAD)


def has_half() -> bool:
    """Whether this processor's kernels read weights of 16 bits. Raises: TersenetError where there are no kernels."""
    return host().isa().has_half


def algorithm(choice: str) -> Algorithm:
    """Of a Winograd choice, on this processor. Raises: TersenetError where there are no kernels."""
    m, half = WINOGRAD[choice]
    return Algorithm(m, host().isa(), "half" if half else "float")


def build(layer: Layer, choice: str, size: tuple[int, ...]) -> nn.Module:
    """The kernel `choice` for `layer`, packed for inputs of `size` (N, C, H, W); it takes any batch."""
    if choice == "torch":
        return TorchConvolution(layer)
    if choice == "direct":
        return DirectConvolution(layer, size)
    return WinogradConvolution(layer, *WINOGRAD[choice])
