"""Networks as they are deployed: Winograd and quantized layers folded, as plain convolutions, or in integers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from tersenet.errors import TersenetError
from tersenet.graph.copies import copied
from tersenet.graph.edits_layers import replace_module
from tersenet.nn.folded import fold, plain
from tersenet.nn.integer import IntegerConv2d
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.winograd import WinogradConv2d

Quantized = Literal["folded", "plain"]


def deployed(model: nn.Module, how: Quantized) -> nn.Module:
    """`folded` or `plain_convolutions`; the network itself if it has no such layers.

    Raises: TersenetError for another word, and see there.
    """
    known = {"folded": folded, "plain": plain_convolutions}
    if how not in known:
        raise TersenetError(f"quantized (={how!r}) must be one of {', '.join(known)}")
    return known[how](model) if deployable(model) else model


def folded(model: nn.Module) -> nn.Module:
    """A copy for inference: quantized layers hold their weights as integers, transformed and rounded once, and Winograd
    layers in floating point are the convolutions that they stand for, where their transforms are exact.

    Its outputs are those of `model` in evaluation mode, bit for bit where no layer becomes a plain convolution.

    Raises: TersenetError, naming the layer, for quantizers that have seen nothing.
    """
    return _swapped(model, lambda layer, _: fold(layer))


def plain_convolutions(model: nn.Module) -> nn.Module:
    """A copy with ordinary convolutions in the place of all Winograd and quantized layers: nothing is rounded, which is
    for runtimes that quantize by themselves.

    Raises: TersenetError, naming the layer, for transforms that were trained freely: they make no convolution.
    """
    return _swapped(model, plain)


def integers(model: nn.Module) -> nn.Module:
    """A copy whose Winograd and quantized layers compute in integers only, see `IntegerConv2d`.

    Raises: TersenetError, naming the layer, for one that is not quantized throughout, or to more than 16 bits.
    """
    return _swapped(model, lambda layer, _: IntegerConv2d(layer))


def deployable(model: nn.Module) -> list[str]:
    """Names of the Winograd and quantized layers."""
    return [name for name, module in model.named_modules() if isinstance(module, (WinogradConv2d, QuantizedConv2d))]


def _swapped(model: nn.Module, change: Callable[[WinogradConv2d | QuantizedConv2d, str], nn.Module]) -> nn.Module:
    found = copied(model, model.parameters()).eval()
    for name in deployable(found):
        layer = found.get_submodule(name)
        assert isinstance(layer, (WinogradConv2d, QuantizedConv2d))
        try:
            new = change(layer, name)
        except TersenetError as error:
            text = str(error)
            raise TersenetError(text if text.startswith(name) else f"{name}: {text}") from None
        if not name:
            return new
        if new is not layer:
            replace_module(found, layer, new)
    return found
