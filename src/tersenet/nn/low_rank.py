"""A convolution as two of lower rank, and a convolution with the 1 x 1 one behind it as one.

Source: Jaderberg et al. 2014, Zhang et al. 2016 and the combination step of He et al. 2017; the mathematics is in
`ops.low_rank`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tersenet.errors import TersenetError
from tersenet.ops.low_rank import merge_pointwise, merging_pays

Form = Literal["spatial", "channel"]
"""`spatial`: k x 1, then 1 x k. `channel`: k x k with fewer filters, then 1 x 1."""


def highest_rank(weight: Tensor, form: Form) -> int:
    """The rank at which a pair can hold any weight of the shape of this one (O, C, kh, kw)."""
    outputs, channels, height, width = weight.shape
    return min(channels * height, outputs * width) if form == "spatial" else min(outputs, channels * height * width)


def pair_of(conv: nn.Conv2d, form: Form, rank: int) -> nn.Sequential:
    """Two convolutions in the place of one. The second has a bias if that has one. All weights are zero: they are for
    the caller to write, since the best ones depend on data.

    Strides, paddings and dilations go with the axis that they belong to.

    Raises:
        TersenetError: a grouped convolution, or a rank that it can't have.
    """
    if conv.groups > 1:
        raise TersenetError(f"a grouped convolution (groups={conv.groups}) can't be split in two of lower rank")
    most = highest_rank(conv.weight, form)
    if not 1 <= rank <= most:
        raise TersenetError(f"the rank must be from 1 to {most}, not {rank}")
    first, second = _spatial_geometry(conv) if form == "spatial" else _channel_geometry(conv)
    return nn.Sequential(
        _made(conv, in_channels=conv.in_channels, out_channels=rank, bias=False, **first),
        _made(conv, in_channels=rank, out_channels=conv.out_channels, bias=conv.bias is not None, **second),
    ).train(conv.training)


def write(conv: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a convolution these values."""
    with torch.no_grad():
        conv.get_parameter("weight").copy_(weight)
        if bias is not None:
            conv.get_parameter("bias").copy_(bias)


def merged(first: nn.Conv2d, second: nn.Conv2d) -> nn.Conv2d:
    """One convolution for `first` and the 1 x 1 convolution behind it, with the same outputs.

    Raises:
        TersenetError: what can't be merged, or would be dearer.
    """
    reason = not_mergeable(first, second)
    if reason is not None:
        raise TersenetError(reason)
    made = _made(
        first,
        in_channels=first.in_channels,
        out_channels=second.out_channels,
        bias=first.bias is not None or second.bias is not None,
        **_channel_geometry(first)[0],
    )
    if not made.weight.is_meta:
        weight, bias, pointwise, own = (
            None if t is None else t.detach().double() for t in (first.weight, first.bias, second.weight, second.bias)
        )
        assert weight is not None
        assert pointwise is not None
        write(made, *merge_pointwise(weight, bias, pointwise, own))
    return made


def not_mergeable(first: nn.Conv2d, second: nn.Conv2d) -> str | None:
    """Why two convolutions, one behind the other, don't become one; None if they do."""
    if first.groups > 1 or second.groups > 1:
        return "one of them is grouped"
    if second.in_channels != first.out_channels:
        return f"the second reads {second.in_channels} channels, the first makes {first.out_channels}"
    if second.kernel_size != (1, 1) or second.stride != (1, 1) or second.padding not in ((0, 0), "same", "valid"):
        return "the second is not a 1x1 convolution of stride 1 without padding"
    if not merging_pays(first.weight, second.weight):
        return "one layer would cost more than the two"
    return None


def _channel_geometry(conv: nn.Conv2d) -> tuple[dict[str, Any], dict[str, Any]]:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(conv, name) for name in names}, {"kernel_size": 1}


def _spatial_geometry(conv: nn.Conv2d) -> tuple[dict[str, Any], dict[str, Any]]:
    (kh, kw), (sh, sw), (dh, dw) = ((v[0], v[1]) for v in (conv.kernel_size, conv.stride, conv.dilation))
    padding = conv.padding
    ph, pw = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
    first: dict[str, Any] = {"kernel_size": (kh, 1), "stride": (sh, 1), "padding": ph, "dilation": (dh, 1)}
    second: dict[str, Any] = {"kernel_size": (1, kw), "stride": (1, sw), "padding": pw, "dilation": (1, dw)}
    return first | {"padding_mode": conv.padding_mode}, second | {"padding_mode": conv.padding_mode}


def _made(like: nn.Conv2d, **settings: Any) -> nn.Conv2d:
    """A convolution of zeros, where the other is and in its mode; frozen if that is. No random numbers are drawn."""
    place: dict[str, Any] = {"device": like.weight.device, "dtype": like.weight.dtype}
    made = skip_init(nn.Conv2d, **settings, **place)
    assert isinstance(made, nn.Conv2d)
    for parameter in made.parameters():
        nn.init.zeros_(parameter).requires_grad_(like.weight.requires_grad)
    return made.train(like.training)
