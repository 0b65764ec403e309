"""A convolution with its weight, and its ReLU, in the Winograd domain."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.nn.masked import MaskedWeight
from tersenet.nn.winograd_quantizer import is_direct
from tersenet.nn.winograd_relu_operator import is_operator, winograd_relu_operator
from tersenet.nn.winograd_relu_settings import Init, WinogradReLUSettings
from tersenet.nn.winograd_transforms import TransformMatrices
from tersenet.ops.winograd import kronecker
from tersenet.ops.winograd_relu import Activation, transformed_input, winograd_relu_conv2d
from tersenet.ops.winograd_tiles import Geometry

Padding = tuple[tuple[int, int], tuple[int, int]]


class WinogradReLUConv2d(MaskedWeight):
    """(N, C_in, H, W) -> (N, C_out, H', W'): A^T [sum over C_in of W * ReLU(B^T d B)] A for every tile d.

    The weight (t t, C_in, C_out), tap = t * row + column, is free: t * t numbers for each pair of channels. With
    `settings.relu` off the layer is linear, and with W = G g G^T it is the convolution by g: the paper's `native`
    network, which keeps its ReLU before the layer; a threshold makes zeros there too. Any map and padding; stride 1.
    Backward keeps the input, the weight and its mask. Computed in float32 under autocast too.

    spatial_share: of the ReLU before the transform in place of the one behind it, 0 to 1. At 1 the layer is the
        ReLU and convolution that it came from; a warm start moves it to 0. No part of what is saved.

    Differs: any size (the published operator takes even ones), bias, F(4, 3); no zero columns beyond the map.

    Raises:
        TersenetError: points that don't fit F(m, r), an input of other channels, or a map smaller than the filter.

    Source: Liu et al., Efficient Sparse-Winograd Convolutional Neural Networks, ICLR 2018.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        padding: int | Padding = 1,
        bias: bool = False,
        settings: WinogradReLUSettings | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.padding: Padding = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
        self.settings = settings or WinogradReLUSettings()
        self.spatial_share = 0.0
        self.transforms = TransformMatrices(self.settings.tile, kernel_size, self.settings.points)
        taps = self.transforms.exact.t**2
        self.weight = nn.Parameter(torch.empty(taps, in_channels, out_channels, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(self.weight[0, 0])) if bias else None)
        self.register_buffer("mask", None)
        # Of a layer without data these stay real: they follow from the settings, no file will fill them.
        where = None if self.weight.is_meta else self.weight.device
        self.transforms.to(device=where, dtype=torch.promote_types(self.weight.dtype, torch.float32))
        if not self.weight.is_meta:
            self.reset("reference")

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, settings: WinogradReLUSettings | None = None) -> Self:
        """The layer with W = G g G^T of the weight g of `conv`, its very bias and training mode.

        Raises: TersenetError for what this layer is not: see `hindrance`.
        """
        reason = hindrance(conv)
        if reason is not None:
            raise TersenetError(f"a convolution can't have its weight in the Winograd domain: {reason}")
        left, right, top, bottom = sides_of(conv)
        made = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size[0], ((top, bottom), (left, right)), False, settings,
            device="meta", dtype=conv.weight.dtype,
        )  # fmt: skip
        made.bias = conv.bias
        if conv.weight.is_meta:
            return made.train(conv.training)
        made.transforms.to(conv.weight.device)
        _, g, _ = made.transforms(torch.float64)
        taps = conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 1)
        weight = (kronecker(g) @ taps.flatten(1).double()).view(-1, *taps.shape[1:])
        made.weight = nn.Parameter(weight.to(conv.weight.dtype), conv.weight.requires_grad)
        return made.train(conv.training)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.settings.tile, (self.kernel_size, self.kernel_size), padding=self.padding)

    @torch.no_grad()
    def reset(self, init: Init) -> None:
        """Draw the weight anew, the bias is zero: `reference` as published, `unit` so that with N(0, 1) before the
        layer it makes values of variance 1. `transform` draws nothing.

        Differs: `unit` is ours. The published draw makes 0.6 of the variance, G g G^T of He's draw 2.8 times of it.
        """
        if init == "transform":
            return
        std = 0.1875 / self.in_channels**0.5
        if init == "reference":
            # Cut at two standard deviations of the normal it is drawn from, whose width makes up for that.
            nn.init.trunc_normal_(self.weight, std=std / _TRUNCATED, a=-2 * std / _TRUNCATED, b=2 * std / _TRUNCATED)
        else:
            at, _, bt = self.transforms(torch.float64)
            second_moment = kronecker(bt).square().sum(1) * (0.5 if self.settings.relu else 1.0)
            gain = (kronecker(at).square() @ second_moment).mean() * self.in_channels
            nn.init.normal_(self.weight, std=float(gain) ** -0.5)
        if self.bias is not None:
            self.bias.zero_()
        self.clean()

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if is_direct():
            return self._direct(x)
        act = self.activation
        if is_operator() and not (act.relu and act.share):
            return self._operator(x)
        # Half precision would cost F(4, 3) two digits.
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            aa, bb = self._matrices(x)
            what = (self.geometry, act, self.transforms.exact)
            return winograd_relu_conv2d(x, self.weight, self.mask, self.bias, aa, bb, *what)

    @property
    def activation(self) -> Activation:
        settings = self.settings
        return Activation(settings.relu, self.spatial_share, 0.0 if settings.relu else settings.threshold)

    def transformed(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """V (t t, P, C_in) of x, as it meets the weight; P counts images and tiles. For counting what is zero."""
        _, bb = self._matrices(x)
        return transformed_input(x, bb, self.geometry, activation or self.activation)

    def _matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at, _, bt = self.transforms(torch.promote_types(x.dtype, torch.float32))
        return kronecker(at), kronecker(bt)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise TersenetError(
                f"a Winograd-domain convolution of in_channels (={self.in_channels}) got an input {tuple(x.shape)}"
            )

    def _direct(self, x: Tensor) -> Tensor:
        """For tracing and counting: the convolution of this shape, by any numbers."""
        r = self.kernel_size
        filters = self.weight[: r * r].permute(2, 1, 0).unflatten(2, (r, r))
        (top, bottom), (left, right) = self.padding
        # Not by relu: whoever looks for a network's own ReLUs must not find one here.
        x = nn.functional.pad(x.clamp(min=0) if self.settings.relu else x, (left, right, top, bottom))
        return nn.functional.conv2d(x, filters, self.bias)

    def _operator(self, x: Tensor) -> Tensor:
        at, _, bt = self.transforms(torch.promote_types(x.dtype, torch.float32))
        named = self.settings.points if isinstance(self.settings.points, str) else None
        padding = [side for sides in self.padding for side in sides]
        what = (named, self.settings.tile, self.settings.relu, padding, self.activation.threshold)
        return winograd_relu_operator(x, self.weight, self.bias, self.mask, at, bt, *what)

    def extra_repr(self) -> str:
        exact, relu = self.transforms.exact, "ReLU in the Winograd domain" if self.settings.relu else "no ReLU"
        if self.activation.threshold:
            relu = f"zeros up to {self.activation.threshold:g}"
        sparse = "" if self.mask is None else ", masked"
        sizes = f"{self.in_channels}, {self.out_channels}, F({exact.m}, {exact.r})"
        return f"{sizes}, padding={self.padding}, {relu}{sparse}"


_TRUNCATED = 0.8796256610342398
"""Standard deviation of a standard normal that is drawn again beyond 2."""


def sides_of(conv: nn.Conv2d) -> list[int]:
    """The padding: left, right, top, bottom."""
    return conv._reversed_padding_repeated_twice  # pyright: ignore[reportPrivateUsage]


def hindrance(conv: nn.Conv2d) -> str | None:
    """Why a convolution can't be such a layer; None if it can."""
    if conv.kernel_size[0] != conv.kernel_size[1] or not 2 <= conv.kernel_size[0] <= 7:
        return f"its kernel is {'x'.join(map(str, conv.kernel_size))}"
    if max(conv.stride) > 1:
        return "it has a stride"
    if max(conv.dilation) > 1:
        return "it is dilated"
    if conv.groups > 1:
        return "depthwise" if conv.groups == conv.in_channels else "it is grouped"
    if conv.padding_mode != "zeros":
        return f"its padding is {conv.padding_mode}"
    return None
