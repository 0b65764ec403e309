"""A grouped convolution among channels of any order: the learned channel shuffle is in its two index tables."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from tersenet.errors import GraphError
from tersenet.nn.adapter import select_channels


class OrderedConv2d(nn.Conv2d):
    """A convolution that may take its input channels in another order, and give its output channels in another.

    gather: (C_in,), the input channel that comes to each place; None where they come in order.
    scatter: (C_out,), the place that each output channel is taken from; None where the next layer reads them as they
        are.

    Both are part of the architecture: they come from an edit and not from the state dict.
    """

    gather: Tensor | None
    scatter: Tensor | None

    def take_order(self, conv: nn.Module | None = None) -> None:
        """The tables of `conv`, if it has some."""
        for name in ("gather", "scatter"):
            table = getattr(conv, name) if isinstance(conv, OrderedConv2d) else None
            self.register_buffer(name, table, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        x = input if self.gather is None else select_channels(input, 1, self.gather)
        y = super().forward(x)
        return y if self.scatter is None else select_channels(y, 1, self.scatter)


class GroupShuffleConv2d(OrderedConv2d):
    """`scatter(grouped convolution(gather(x)))`: each output channel reads a group of input channels chosen for it.

    Shapes: (N, C_in, H, W) -> (N, C_out, H', W').

    Differs from the published conversion: the bias is put in order too, and tables that change nothing are left out.

    Source: Zhang et al., arXiv 2002.08127.
    """

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, groups: int, rows: tuple[int, ...], columns: tuple[int, ...]) -> Self:
        """What `conv` computes with the weights inside the blocks; the others are dropped.

        Args:
            rows, columns: the output and input channels in the order in which `groups` equal blocks are cut.

        Raises:
            GraphError: a grouped convolution, or groups that don't divide both numbers of channels.
        """
        if conv.groups != 1 or groups < 1 or conv.in_channels % groups or conv.out_channels % groups:
            raise GraphError(
                f"a convolution of {conv.in_channels} to {conv.out_channels} channels in {conv.groups} group(s) can't "
                f"be split into {groups} groups: they must divide both numbers, and it must have one group"
            )
        old = conv.weight.detach()
        # Allocated nowhere: the weights that it is made with are replaced.
        made = cls(
            conv.in_channels, conv.out_channels, (1, 1), groups=groups, bias=False, device="meta", dtype=old.dtype
        )
        for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode", "transposed", "output_padding"):
            setattr(made, name, getattr(conv, name))
        made._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
        inputs = conv.in_channels // groups
        block = torch.arange(conv.out_channels, device="cpu") // (conv.out_channels // groups)
        reads = torch.tensor(columns, device="cpu").view(groups, inputs)[block]
        order = torch.tensor(rows, device="cpu").to(old.device)
        made.weight = nn.Parameter(old[order[:, None], reads.to(old.device)], conv.weight.requires_grad)
        if conv.bias is not None:
            made.bias = nn.Parameter(conv.bias.detach()[order], conv.bias.requires_grad)
        # The tables are part of the architecture: they come from the edit, not from the state dict, and stay real
        # where the rest is on `meta`.
        device = torch.device("cpu") if old.is_meta else old.device
        made.register_buffer("gather", _table(columns, device), persistent=False)
        made.register_buffer("scatter", _table(_inverse(rows), device), persistent=False)
        return made.train(conv.training)

    def extra_repr(self) -> str:
        moved = [name for name in ("gather", "scatter") if getattr(self, name) is not None]
        return ", ".join([super().extra_repr(), *moved])


def _inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    found = [0] * len(permutation)
    for place, channel in enumerate(permutation):
        found[channel] = place
    return tuple(found)


def _table(values: tuple[int, ...], device: torch.device) -> Tensor | None:
    if values == tuple(range(len(values))):
        return None
    return torch.tensor(values, dtype=torch.long, device=device)
