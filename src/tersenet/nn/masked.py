"""Weights with a mask: what is pruned stays zero, whoever trains, saves or loads it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError


class MaskedWeight(nn.Module):
    """A layer whose `weight` counts as zero where `mask` is False. Without a mask it is an ordinary layer.

    The mask is a buffer, so checkpoints, running averages and parallel training carry it; pruned weights get no
    gradient, so no optimizer brings them back. Momentum that they had may move what is stored, never what is
    computed; `clean` puts zeros there.

    Masks and weights are read as (taps, C_in, C_out), whatever the layer stores: see `canonical`.
    """

    weight: Tensor
    mask: Tensor | None

    def make_sparse(self) -> None:
        """Give it a mask that keeps everything, on the weight's device."""
        if self.mask is None:
            self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool, requires_grad=False))

    def canonical(self, stored: Tensor) -> Tensor:
        """(taps, C_in, C_out) of a tensor of the weight's shape: a view of it."""
        return stored

    def stored(self, canonical: Tensor) -> Tensor:
        """The inverse of `canonical`."""
        return canonical

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Take over a mask (taps, C_in, C_out), and put zeros where it is False.

        Raises: TersenetError for a mask of another size, such as that of another tile.
        """
        assert self.mask is not None
        shape = tuple(self.canonical(self.weight).shape)
        if tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise TersenetError(
                f"a mask of {tuple(mask.shape)} for a weight of {shape}, of (taps, C_in, C_out): it is of another "
                "layer or tile, or not of truth values"
            )
        self.mask.copy_(self.stored(mask))
        self.clean()

    @torch.no_grad()
    def clean(self) -> None:
        """Zeros, without a sign, in the pruned places."""
        if self.mask is not None:
            self.weight.masked_fill_(~self.mask, 0)

    @property
    def density(self) -> float:
        """Share of the weights that are kept."""
        return 1.0 if self.mask is None else int(self.mask.sum()) / self.mask.numel()


class MaskedConv2d(MaskedWeight, nn.Conv2d):
    """`nn.Conv2d` with a mask on its weight: pruning in the spatial domain. Made by `from_conv`."""

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Self:
        """The same convolution, with the very parameters of `conv` and its training mode."""
        made = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # pyright: ignore[reportArgumentType]
            conv.groups, conv.bias is not None, conv.padding_mode, device="meta", dtype=conv.weight.dtype,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        made.weight, made.bias = conv.weight, conv.bias
        made.register_buffer("mask", None)
        made.make_sparse()
        return made.train(conv.training)

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.permute(2, 3, 1, 0).flatten(0, 1)

    def stored(self, canonical: Tensor) -> Tensor:
        return canonical.unflatten(0, self.kernel_size).permute(3, 2, 0, 1)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        masked = weight if self.mask is None else weight.masked_fill(~self.mask, 0)
        return super()._conv_forward(input, masked, bias)


class MaskedLinear(MaskedWeight, nn.Linear):
    """`nn.Linear` with a mask on its weight. Made by `from_linear`. It has one tap."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """The same layer, with the very parameters of `linear` and its training mode."""
        sizes = (linear.in_features, linear.out_features)
        made = cls(*sizes, "bias" in dict(linear.named_parameters()), device="meta", dtype=linear.weight.dtype)
        made.weight, made.bias = linear.weight, linear.bias
        made.register_buffer("mask", None)
        made.make_sparse()
        return made.train(linear.training)

    def canonical(self, stored: Tensor) -> Tensor:
        return stored.t().unsqueeze(0)

    def stored(self, canonical: Tensor) -> Tensor:
        return canonical.squeeze(0).t()

    def forward(self, input: Tensor) -> Tensor:
        masked = self.weight if self.mask is None else self.weight.masked_fill(~self.mask, 0)
        return nn.functional.linear(input, masked, self.bias)


def masked_layers(model: nn.Module) -> dict[str, MaskedWeight]:
    """Name -> layer, of those that have a mask."""
    found: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, MaskedWeight)}
    return {name: layer for name, layer in found.items() if layer.mask is not None}
