"""The layer with its weight in the Winograd domain as one operator: what `lower` finds in an exported graph.

The operator computes what the layer computes, by the same functions. Nothing but lowering switches it on, so exported
programs stay free of operators of ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersenet.nn.switch import Switch
from tersenet.ops.winograd import kronecker
from tersenet.ops.winograd_relu import Activation, winograd_relu_conv2d
from tersenet.ops.winograd_tiles import Geometry

_switch = Switch("layers of the Winograd domain as operators")
is_operator = _switch.is_on
as_operator = _switch.on
"""Inside, every `WinogradReLUConv2d` that this thread calls, and whose ReLU has moved, is one call of the operator."""


def geometry_of(tile: int, taps: int, padding: Sequence[int]) -> Geometry:
    """Of F(tile, r) with t = `taps` and the padding (top, bottom, left, right)."""
    r = taps - tile + 1
    top, bottom, left, right = padding
    return Geometry(tile, (r, r), padding=((top, bottom), (left, right)))


@torch.library.custom_op(
    "tersenet::winograd_relu_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, Tensor at, Tensor bt, str? points, int tile, "
    "bool relu, int[] padding, float threshold) -> Tensor",
)
def winograd_relu_operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    at: Tensor,
    bt: Tensor,
    points: str | None,
    tile: int,
    relu: bool,
    padding: Sequence[int],
    threshold: float,
) -> Tensor:
    """x (N, C_in, H, W), weight and mask (t t, C_in, C_out), A^T (m, t), B^T (t, t) -> (N, C_out, H', W').

    `points` is the name of the set that the transforms come from, if it has one; `padding` (top, bottom, left, right);
    `threshold` as of `Activation`.
    """
    geometry = geometry_of(tile, len(bt), padding)
    matrices = (kronecker(at), kronecker(bt))
    return winograd_relu_conv2d(x, weight, mask, bias, *matrices, geometry, Activation(relu, threshold=threshold))


@winograd_relu_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    at: Tensor,
    bt: Tensor,
    points: str | None,
    tile: int,
    relu: bool,
    padding: Sequence[int],
    threshold: float,
) -> Tensor:
    geometry = geometry_of(tile, len(bt), padding)
    shape = (x.shape[0], weight.shape[2], geometry.out(x.shape[2], 0), geometry.out(x.shape[3], 1))
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    order = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)


OPERATOR = torch.ops.tersenet.winograd_relu_conv2d.default
"""As it stands in a graph."""
