"""A convolution with the batch norm behind it in its weight and bias."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tersenet.errors import TersenetError


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution that gives what both give in evaluation mode. It always has a bias.

    With scale = gamma / sqrt(var + eps): W <- scale W, b <- scale (b - mean) + beta, in float64. Channels with gamma 0
    become constant.

    Raises:
        TersenetError: what can't be folded.
    """
    reason = not_foldable(conv, norm)
    if reason is not None:
        raise TersenetError(reason)
    made = copy.deepcopy(conv)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    affine = dict(norm.named_parameters())
    with torch.no_grad():
        scale = (variance.double() + norm.eps).rsqrt()
        if "weight" in affine:
            scale = scale * affine["weight"].double()
        bias = -mean.double() * scale
        if conv.bias is not None:
            bias = bias + conv.bias.double() * scale
        if "bias" in affine:
            bias = bias + affine["bias"].double()
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    trained = conv.weight.requires_grad
    made.weight = nn.Parameter(weight.to(conv.weight), requires_grad=trained)
    made.bias = nn.Parameter(bias.to(conv.weight), requires_grad=trained)
    return made


def not_foldable(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> str | None:
    """Why a batch norm does not go into a convolution; None if it does."""
    if norm.running_mean is None or norm.running_var is None:
        return "the batch norm has no statistics of its own"
    if norm.num_features != conv.out_channels:
        return f"the batch norm has {norm.num_features} channels, the convolution makes {conv.out_channels}"
    return None
