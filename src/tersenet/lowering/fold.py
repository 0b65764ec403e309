"""Batch norms, and other scales and shifts of channels, folded into the layer before them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tersenet.lowering.integers import rescaled
from tersenet.lowering.program import attribute, constant, reader
from tersenet.nn import quantized_operator, winograd_relu_operator
from tersenet.nn.adapter import select_channels

_aten = torch.ops.aten
# Its weight has output channels last.
_DOMAIN = winograd_relu_operator.OPERATOR
_LAYERS = frozenset(
    [
        _aten.conv1d.default,
        _aten.conv2d.default,
        _aten.conv3d.default,
        _aten.conv1d.padding,
        _aten.conv2d.padding,
        _aten.conv3d.padding,
        _aten.linear.default,
        _DOMAIN,
        quantized_operator.OPERATOR,
    ]
)
# torch.export's own form, and the one that is left when it has been made functional.
_BATCH_NORM = _aten.batch_norm.default
_FUNCTIONAL_NORM = _aten._native_batch_norm_legit_no_training.default
_NORMS = (_BATCH_NORM, _FUNCTIONAL_NORM)
_CHUNK = 2**16  # numbers in float64


@dataclass(frozen=True)
class _Affine:
    """y * scale + shift for each channel, float64; `nodes` compute it of `source`, the last one gives the result."""

    scale: Tensor
    shift: Tensor
    source: fx.Node
    nodes: tuple[fx.Node, ...]


def fold_affine(made: fx.GraphModule) -> int:
    """Fold what reads a layer alone, computing in float64. Returns how many operators that were."""
    folded = 0
    for node in list(made.graph.nodes):
        if node.target in _LAYERS:
            while (found := _affine(made, node)) is not None and _fold(made, node, found):
                folded += 1
    return folded


def _fold(made: fx.GraphModule, layer: fx.Node, affine: _Affine) -> bool:
    if not _taken(made, layer, affine):
        return False
    affine.nodes[-1].replace_all_uses_with(affine.source)
    for node in reversed(affine.nodes):
        made.graph.erase_node(node)
    return True


def _taken(made: fx.GraphModule, layer: fx.Node, affine: _Affine) -> bool:
    """Whether the layer computes what it is to be multiplied with and what is to be added, too."""
    if layer.target is quantized_operator.OPERATOR:
        return rescaled(made, layer, affine.scale, affine.shift)  # its output is rounded before
    args: Any = layer.args
    weight = constant(made, args[1])
    given = args[2] if len(args) > 2 else layer.kwargs.get("bias")
    bias = constant(made, given)
    if weight is None or (bias is None) != (given is None):
        return False
    scale = affine.scale if layer.target is _DOMAIN else affine.scale.view(-1, *[1] * (weight.dim() - 1))
    scaled = _product(weight, scale)
    shifted = affine.shift if bias is None else affine.shift + bias.double() * affine.scale
    kept = {key: value for key, value in layer.kwargs.items() if key != "bias"}
    new = [attribute(made, value.to(weight.dtype), layer) for value in (scaled, shifted)]
    layer.args = (args[0], *new, *args[3:])
    layer.kwargs = kept
    return True


def _product(weight: Tensor, scale: Tensor) -> Tensor:
    """weight * scale, rounded once, by filters that fit into the cache: what takes memory for the first time takes
    longer than it computes."""
    result = torch.empty_like(weight)
    filters = max(1, _CHUNK * len(weight) // max(weight.numel(), 1))
    parts = (one.split(filters) for one in (weight, scale.expand_as(weight), result))
    for part, factor, place in zip(*parts, strict=True):
        place.copy_(part.double().mul_(factor))
    return result


def _affine(made: fx.GraphModule, layer: fx.Node) -> _Affine | None:
    """The batch norm, factor or summand that alone reads `layer`, as it is for the layer's channels: they may be put in
    another order before."""
    value, order = layer.meta["val"], _order(made, reader(layer))
    source = layer if order is None else reader(layer)
    node = None if source is None else reader(source)
    if node is None or source is None or value.dim() < 2:
        return None
    if layer.target is _aten.linear.default and value.dim() != 2:
        return None
    found = _norm(made, source, node) if node.target in _NORMS else _term(made, source, node)
    if found is None or order is None:
        return found
    scale, shift = torch.empty_like(found.scale), torch.empty_like(found.shift)
    scale[order], shift[order] = found.scale, found.shift
    return replace(found, scale=scale, shift=shift)


def _order(made: fx.GraphModule, node: fx.Node | None) -> Tensor | None:
    """The channel that `node` takes to each place, if it puts all of them in another order."""
    if node is None or node.target is not select_channels or node.args[1] != 1:
        return None
    order = constant(made, node.args[2])
    if order is None or not torch.equal(order.sort().values, torch.arange(node.meta["val"].shape[1])):
        return None
    return order


def _term(made: fx.GraphModule, source: fx.Node, node: fx.Node) -> _Affine | None:
    """A factor or a summand."""
    value = source.meta["val"]
    if node.target not in (_aten.mul.Tensor, _aten.add.Tensor) or node.kwargs or len(node.args) != 2:
        return None
    other: Any = node.args[1] if node.args[0] is source else node.args[0]
    operand = constant(made, other)
    if operand is None or operand.dtype != value.dtype or node.meta["val"].shape != value.shape:
        return None
    channels = _per_channel(operand.double(), tuple(value.shape[1:]))
    if channels is None:
        return None
    if node.target is _aten.mul.Tensor:
        return _Affine(channels, torch.zeros_like(channels), source, (node,))
    return _Affine(torch.ones_like(channels), channels, source, (node,))


def _norm(made: fx.GraphModule, source: fx.Node, node: fx.Node) -> _Affine | None:
    functional = node.target is _FUNCTIONAL_NORM
    result = reader(node) if functional else node
    weight, bias, mean, variance = (constant(made, arg) for arg in node.args[1:5])
    if node.args[0] is not source or result is None or mean is None or variance is None:
        return None
    if (functional and result.args[1:] != (0,)) or (not functional and node.args[5]):
        return None
    if (weight is None) != (node.args[1] is None) or (bias is None) != (node.args[2] is None):
        return None
    epsilon: Any = node.args[6 if functional else 7]
    scale = (variance.double() + epsilon).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    shift = shift if bias is None else shift + bias.double()
    return _Affine(scale, shift, source, tuple(dict.fromkeys((node, result))))


def _per_channel(operand: Tensor, shape: tuple[Any, ...]) -> Tensor | None:
    """(C,) if `operand`, broadcast to (N, *shape), is one value for each channel."""
    if operand.dim() > len(shape) + 1 or (operand.dim() == len(shape) + 1 and operand.shape[0] != 1):
        return None
    if not all(isinstance(size, int) for size in shape):
        return None
    full = operand.reshape(operand.shape[-len(shape) :]) if operand.dim() > len(shape) else operand
    full = full.expand(shape).reshape(shape[0], -1)
    return full[:, 0].clone() if bool((full == full[:, :1]).all()) else None
