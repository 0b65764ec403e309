"""Layers in bfloat16 on AMX's tiles, and which of their results stay bfloat16 in memory.

A result stays bfloat16 where everybody who reads it can: half of the memory traffic, and nothing to convert. That is
decided in the graph, when it is known which kernel computes each layer; the modules themselves take either type.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels import threads
from tersenet.kernels.bf16_call import PackedBf16, Types, bf16_call, dense, pack_bf16
from tersenet.kernels.host import host
from tersenet.kernels.winograd import BOUNDS, Call
from tersenet.lowering.activations import ACTIVATIONS
from tersenet.lowering.calls import key_of, watched
from tersenet.lowering.layers import Layer
from tersenet.lowering.linears import LinearLayer
from tersenet.lowering.pools import MaxPool, MeanPool
from tersenet.lowering.segments import Step

_aten = torch.ops.aten
# Operators whose result has the type of what they read, and no value that bfloat16 lacks but for one rounding.
_SAME_TYPE = frozenset(
    [
        _aten.adaptive_avg_pool2d.default,
        _aten.avg_pool2d.default,
        _aten.mean.dim,
        _aten.flatten.using_ints,
        _aten.reshape.default,
        _aten.cat.default,
        _aten.relu.default,
    ]
)
_TYPES = (torch.float32, torch.bfloat16)


class HalfModule(nn.Module):
    """A layer with its weight in bfloat16. `narrow`: its result is bfloat16 too."""

    narrow = False

    def __init__(self, packed: PackedBf16, padding: tuple[int, int], activation: str) -> None:
        super().__init__()
        self._packed, self._padding = packed, padding
        self._function = None if activation in BOUNDS else ACTIVATIONS[activation]
        self._cut_off = activation if self._function is None else "none"
        self._calls: dict[tuple[Any, ...], Call | None] = {}

    def _result(self, x: Tensor, residual: Tensor | None = None, reuse: bool = False) -> Tensor | None:
        """None where the kernel does not take these tensors."""
        if watched(x):
            return None
        call = self._known(x, residual)
        if call is None:
            return None
        over = residual if reuse and residual is not None and residual.dtype == call.dtype else None
        y = call.run(x, self._packed.tables, residual, over)
        return y if self._function is None else self._function(y)

    def _known(self, x: Tensor, residual: Tensor | None) -> Call | None:
        key = (self.narrow, *key_of(x, residual))
        if key not in self._calls:
            self._calls[key] = self._call(x, residual)
        return self._calls[key]

    def _call(self, x: Tensor, residual: Tensor | None) -> Call | None:
        packed = self._packed
        if x.dtype not in _TYPES or not x.is_cpu or x.dim() != 4 or x.shape[1] != packed.in_channels:
            return None
        together = x.stride(1) == 1 or x.shape[1] == 1
        if not together or (packed.interleaved and x.shape[3] > 1 and x.stride(3) != x.shape[1]):
            return None
        half = residual is not None and residual.dtype == torch.bfloat16
        types = Types(x.dtype == torch.bfloat16, self.narrow, half)
        moves = (packed.kernel, packed.stride, self._padding, packed.dilation)
        what = (packed.interleaved, packed.groups, *moves, packed.out_channels, self._cut_off, threads.available())
        call = bf16_call(packed.algorithm, tuple(x.shape), x.stride(), types, *what)
        if min(call.shape) < 1:
            return None  # torch says what is wrong
        if residual is None:
            return call
        same = residual.shape == call.shape and residual.dtype in _TYPES and residual.is_cpu
        return call if same and residual.is_contiguous(memory_format=torch.channels_last) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> HalfModule:
        return self  # it never changes once its network is made


class HalfConvolution(HalfModule):
    """A convolution; `plain` torch for whoever watches operators, and for other types or memory orders."""

    def __init__(self, layer: Layer, plain: nn.Module) -> None:
        packed = pack_bf16(layer.weight, layer.bias, layer.stride, layer.dilation, layer.groups)
        super().__init__(packed, layer.padding, layer.activation)
        self.plain = plain
        self._reuse = layer.reuse

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self._result(x, residual, self._reuse)
        if y is not None:
            return y
        return self.plain(_plain(x), None if residual is None else _plain(residual))

    def step(self, x: Tensor, residual: Tensor | None = None) -> Step | None:
        call = None if self._function is not None else self._known(x, residual)
        if call is None:
            return None
        return Step(call, self._packed.tables, self._reuse and residual is not None and residual.dtype == call.dtype)


class HalfLinear(HalfModule):
    """A linear layer, as a convolution of images of one pixel."""

    def __init__(self, layer: LinearLayer) -> None:
        super().__init__(pack_bf16(layer.weight[:, :, None, None], layer.bias), (0, 0), layer.activation)
        self._bias = None if layer.bias is None else layer.bias.clone()
        self._activation = ACTIVATIONS[layer.activation]

    def forward(self, x: Tensor) -> Tensor:
        packed = self._packed
        y = None
        if x.dim() > 0 and x.shape[-1] == packed.in_channels and not watched(x):
            y = self._result(_pixels(x.reshape(-1, packed.in_channels)))
        if y is None:
            return self._activation(F.linear(_plain(x), dense(packed), self._bias))
        return y.view(*x.shape[:-1], packed.out_channels)

    def step(self, x: Tensor) -> Step | None:
        rows = _pixels(x) if x.dim() == 2 and x.is_contiguous() else None
        call = None if rows is None or self._function is not None else self._known(rows, None)
        return None if call is None else Step(call, self._packed.tables, flat=True)


def has_tiles() -> bool:
    """Whether these kernels can run here."""
    try:
        return host().amx_problem is None
    except TersenetError:
        return False


def narrow_results(graph: fx.GraphModule, layers: Collection[str]) -> set[str]:
    """Which of the modules `layers`, which compute in bfloat16, can leave their result so: those whose readers are
    others of them, or operators that keep the type, whose readers are, and so on."""

    def keeps(node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(graph.get_submodule(str(node.target)), (MaxPool, MeanPool))
        return node.target in _SAME_TYPE

    nodes = graph.graph.nodes
    ours = {node for node in nodes if node.op == "call_module" and node.target in layers}
    passing = {node for node in nodes if keeps(node)}
    narrow = ours | passing
    while True:
        wide = {node for node in narrow if not all(user in ours or user in narrow for user in node.users)}
        wide |= {node for node in narrow & passing if not all(source in narrow for source in _images(node))}
        if not wide:
            return {str(node.target) for node in narrow & ours}
        narrow -= wide


def set_narrow(graph: fx.GraphModule, modules: dict[str, nn.Module]) -> set[str]:
    """Tell the layers among `modules`, by name, what their result is to be. Returns the narrow ones."""
    found = narrow_results(graph, {name for name, module in modules.items() if isinstance(module, HalfModule)})
    for name, module in modules.items():
        if isinstance(module, HalfModule):
            module.narrow = name in found
    return found


def _pixels(rows: Tensor) -> Tensor:
    """(N, C) as N images (C, 1, 1), one below the other in channels-last memory."""
    return rows.view(len(rows), 1, 1, rows.shape[1]).permute(0, 3, 1, 2)


def _images(node: fx.Node) -> list[fx.Node]:
    """What it reads that has values: no sizes."""
    return [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]


def _plain(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x
