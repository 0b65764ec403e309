"""What a convolution costs on the kernels in integers, for the tables that tile and bits are chosen by."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn

from tersenet.errors import TersenetError
from tersenet.kernels.int8 import usable_isas
from tersenet.lowering.choose import Size, times_of
from tersenet.lowering.integers import INT8, IntegerLayer
from tersenet.nn.folded import FoldedConv2d, FoldedWinogradConv2d, fold
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d, calibration
from tersenet.nn.winograd_settings import Quantization, Quantizer, WinogradSettings


def names() -> tuple[str, ...]:
    """The instructions that kernels in integers can use here."""
    try:
        return tuple(isa.name for isa in usable_isas())
    except TersenetError:
        return ()


def in_integers(conv: nn.Conv2d, size: Size, tile: Literal["direct"] | int, bits: int) -> float | None:
    """Median milliseconds of `conv` with everything in so many bits, directly or by F(tile, r), for an input of `size`
    (N, C, H, W); None if there is no kernel for it."""
    own, one = copy.deepcopy(conv).cpu().float(), Quantizer(bits=bits)
    if tile == "direct":
        layer = QuantizedConv2d.from_conv(own, Quantization(input=one, weight=one, output=one))
    else:
        settings = WinogradSettings(tile=tile, quantization=Quantization.tapwise(bits))
        layer = WinogradConv2d.from_conv(own, settings)
    with torch.no_grad(), calibration(layer):
        layer(torch.randn(size, generator=torch.Generator().manual_seed(0)))
    folded = fold(layer.eval())
    assert isinstance(folded, FoldedConv2d | FoldedWinogradConv2d)
    if any(folded.edges):  # padding that is added before
        return None
    found = IntegerLayer("", folded.as_convolution(), False, "none")
    return times_of(found, size, (INT8,))[INT8] if found.fits(INT8) else None
