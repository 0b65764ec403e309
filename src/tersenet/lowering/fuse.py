"""Convolutions and pruned linear layers found in the graph, with what follows them, and put into one module each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from tersenet.lowering.integers import integers_at
from tersenet.lowering.layers import SPARSE, AnyLayer, DomainLayer, Layer, Pair
from tersenet.lowering.linears import LinearLayer
from tersenet.lowering.modules import reference
from tersenet.lowering.program import constant, erase, reader
from tersenet.lowering.reuse import with_reuse
from tersenet.nn import quantized_operator
from tersenet.nn.winograd_relu_operator import OPERATOR, geometry_of

_aten = torch.ops.aten
_LINEAR = _aten.linear.default
_PLAIN: dict[Any, str] = {
    _aten.relu.default: "relu",
    _aten.relu6.default: "relu6",
    _aten.silu.default: "silu",
    _aten.hardswish.default: "hardswish",
}
_CUTS = frozenset([_aten.hardtanh.default, _aten.clamp.default])
_FIELDS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": [1], "padding": [0], "dilation": [1], "groups": 1}


def fuse(made: fx.GraphModule, linears: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, AnyLayer]:
    """Replace every convolution of images, and every linear layer of which enough is pruned, by a module `layer_0`, ...
    of plain torch; returns what each computes.

    Later convolutions come first, since of two that are added only one can take the sum. With `linears` all linear
    layers are taken: there is a kernel that reads half as much for them. `dtype` is that of the convolutions.
    """
    plain = partial(_plain, dtype=dtype)
    own = {_aten.conv2d.default: plain, _aten.conv2d.padding: plain, _LINEAR: partial(_linear, dense=linears)}
    kinds = {**_DESCRIBED, **own}
    found: dict[str, AnyLayer] = {}
    nodes = [node for node in made.graph.nodes if node.target in kinds]
    for number, node in reversed(list(enumerate(nodes))):
        described = kinds[node.target](made, node)
        layer = None if described is None else _fused(made, node, f"layer_{number}", described)
        if layer is not None:
            found[f"layer_{number}"] = layer
    return with_reuse(made, dict(reversed(found.items())))


def _fused(made: fx.GraphModule, node: fx.Node, target: str, described: Callable[..., AnyLayer]) -> AnyLayer:
    nodes = [node]
    residual = None if node.target is _LINEAR else _residual(node)
    if residual is not None:
        nodes.append(next(iter(node.users)))
    activation = _activation(nodes[-1])
    if activation is not None:
        nodes.append(next(iter(nodes[-1].users)))
    layer = described(name=_name(node), residual=residual is not None, activation=activation or "none")
    made.add_module(target, reference(layer))
    with made.graph.inserting_before(nodes[-1]):
        call = made.graph.call_module(target, (node.args[0], *([residual] if residual is not None else [])))
    call.meta = dict(nodes[-1].meta)
    nodes[-1].replace_all_uses_with(call)
    erase(made, nodes)
    return layer


def _plain(made: fx.GraphModule, node: fx.Node, dtype: torch.dtype = torch.float32) -> Callable[..., Layer] | None:
    """The layer but for what follows it, or None for one that stays as it is."""
    given: dict[str, Any] = {**_DEFAULTS, **dict(zip(_FIELDS, node.args, strict=False)), **node.kwargs}
    weight, bias = constant(made, given["weight"]), constant(made, given["bias"])
    if weight is None or (bias is None) != (given["bias"] is None) or node.meta["val"].dim() != 4:
        return None
    stride, dilation = _pair(given["stride"]), _pair(given["dilation"])
    padding = _padding(given["padding"], stride, dilation, weight.shape[2:])
    if padding is None or weight.dtype != dtype:
        return None
    return partial(
        Layer,
        weight=weight.clone(),
        bias=None if bias is None else bias.clone(),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=given["groups"],
    )


def _domain(made: fx.GraphModule, node: fx.Node) -> Callable[..., DomainLayer] | None:
    """The same for a layer with its weight in the Winograd domain; its mask becomes zeros."""
    args: Any = node.args
    _, *tensors, points, tile, relu, padding, threshold = args
    weight, bias, mask, at, bt = (constant(made, tensor) for tensor in tensors)
    hidden = any((value is None) != (given is None) for value, given in zip((bias, mask), tensors[1:3], strict=True))
    if weight is None or at is None or bt is None or hidden or weight.dtype != torch.float32:
        return None
    return partial(
        DomainLayer,
        weight=weight.clone() if mask is None else weight.masked_fill(~mask, 0),
        bias=None if bias is None else bias.clone(),
        at=at.clone(),
        bt=bt.clone(),
        points=points,
        relu=relu,
        threshold=threshold,
        geometry=geometry_of(tile, len(bt), padding),
    )


def _linear(made: fx.GraphModule, node: fx.Node, dense: bool = False) -> Callable[..., LinearLayer] | None:
    """The same for a linear layer; None too where no kernel would gain by what is pruned, but for `dense`."""
    given: dict[str, Any] = {"bias": None, **dict(zip(_FIELDS, node.args, strict=False)), **node.kwargs}
    weight, bias = constant(made, given["weight"]), constant(made, given["bias"])
    if weight is None or (bias is None) != (given["bias"] is None) or weight.dim() != 2:
        return None
    # Not copied: weights are large, and the kernels that keep one have their own.
    found = partial(LinearLayer, weight=weight, bias=bias)
    if weight.dtype != torch.float32 or weight.numel() == 0:
        return None
    layer = found(name="", activation="none")
    return found if dense or any(layer.fits(choice) for choice in SPARSE) else None


_DESCRIBED: dict[Any, Callable[[fx.GraphModule, fx.Node], Callable[..., AnyLayer] | None]] = {
    _aten.conv2d.default: _plain,
    _aten.conv2d.padding: _plain,
    _LINEAR: _linear,
    OPERATOR: _domain,
    quantized_operator.OPERATOR: integers_at,
}


def _residual(node: fx.Node) -> fx.Node | None:
    """What is added to `node`, if the sum alone reads it and both have one shape."""
    add = reader(node)
    if add is None or add.target is not _aten.add.Tensor or add.kwargs.get("alpha", 1) != 1 or len(add.args) != 2:
        return None
    other: Any = add.args[1] if add.args[0] is node else add.args[0]
    value = getattr(other, "meta", {}).get("val")
    if other is node or not isinstance(other, fx.Node) or not isinstance(value, torch.Tensor):
        return None
    same = value.shape == node.meta["val"].shape and value.dtype == torch.float32
    return other if same else None


def _activation(node: fx.Node) -> str | None:
    after = reader(node)
    if after is None:
        return None
    if after.target in _PLAIN:
        return _PLAIN[after.target]
    if after.target in _CUTS and tuple(after.args[1:]) == (0, 6) and not after.kwargs:
        return "relu6"
    return None


def _pair(value: Any) -> Pair:
    return (int(value[0]), int(value[-1]))


def _padding(value: Any, stride: Pair, dilation: Pair, kernel: torch.Size) -> Pair | None:
    """None for one that is not the same on both sides."""
    if value == "valid":
        return (0, 0)
    if value != "same":
        return _pair(value)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return None if any(size % 2 for size in total) else (total[0] // 2, total[1] // 2)


def _name(node: fx.Node) -> str:
    """The path of the module that ran the convolution, or the operator's name outside of any."""
    stack: Any = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path if path and not path.startswith("_empty") else node.name
