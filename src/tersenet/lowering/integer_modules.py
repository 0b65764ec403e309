"""The modules that compute quantized layers of a lowered network, and what they hand on to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersenet.kernels import threads
from tersenet.kernels.int8_call import int8_call
from tersenet.kernels.int8_pack import Rounded, pack_int8
from tersenet.kernels.winograd import BOUNDS, Call
from tersenet.lowering.activations import ACTIVATIONS
from tersenet.lowering.calls import key_of, watched
from tersenet.lowering.integers import IntegerLayer
from tersenet.lowering.segments import Step


class TorchInteger(nn.Module):
    """The folded layer in plain torch."""

    gives: Rounded | None = None
    """The rounding of those who read the result, which is its levels then, as int8."""

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__()
        # Not buffers: tensors of a graph's modules are put into channels-last order, which these have no use for.
        self._computes = layer.computes
        self._activation = ACTIVATIONS[layer.activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.dtype == torch.int8:
            assert self._computes.input is not None
            x = x.to(torch.float32) * self._computes.input
        y = self._computes.compute(x)
        y = self._activation(y if residual is None else y.add_(residual))
        if self.gives is None:
            return y
        scale, lowest, highest = self.gives
        return (y / scale).round_().clamp_(lowest, highest).to(torch.int8)

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchInteger:
        return self  # it never changes once its network is made


def in_float64(layer: IntegerLayer, args: Sequence[Tensor]) -> Tensor:
    """What `layer` computes of an input and, if it has one, a residual."""
    wide = TorchInteger(replace(layer, computes=layer.computes.double()))
    return wide(*(x.double() for x in args))


class IntegerConvolution(TorchInteger):
    """The generated kernels; plain torch for whoever watches operators, and for other types or memory orders."""

    def __init__(self, layer: IntegerLayer) -> None:
        super().__init__(layer)
        self._packed = pack_int8(layer.integers, layer.moves)
        self._reuse = layer.reuse
        self._function = None if layer.activation in _CUTS else ACTIVATIONS[layer.activation]
        self._cut_off = layer.activation if self._function is None else "none"
        self._calls: dict[tuple[Any, ...], Call | None] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        call = None if watched(x) else self._known(x, residual)
        if call is None:
            return super().forward(x, residual)
        y = call.run(x, self._packed.tables, residual, residual if self._reuse and self.gives is None else None)
        return y if self._function is None else self._function(y)

    def step(self, x: Tensor, residual: Tensor | None = None) -> Step | None:
        """The call that forward makes; None if it does something else."""
        call = None if self._function is not None else self._known(x, residual)
        over = self._reuse and self.gives is None and residual is not None
        return None if call is None else Step(call, self._packed.tables, over)

    @property
    def takes(self) -> Rounded | None:
        """The rounding of its input, if it can take levels."""
        return None if self._packed.in_channels % _TOGETHER else self._packed.input

    @property
    def can_give(self) -> bool:
        """Whether its result can be levels."""
        return self._function is None and self._packed.out_channels % _TOGETHER == 0

    def _known(self, x: Tensor, residual: Tensor | None) -> Call | None:
        key = (self.gives, *key_of(x, residual))
        if key not in self._calls:
            self._calls[key] = self._call(x, residual)
        return self._calls[key]

    def _call(self, x: Tensor, residual: Tensor | None) -> Call | None:
        """None where the kernels do not take these tensors."""
        taken = x.dtype == torch.int8
        if not (taken or x.dtype == torch.float32) or not x.is_cpu or x.dim() != 4:
            return None
        if x.shape[1] != self._packed.in_channels or (x.stride(1) != 1 and x.shape[1] > 1):
            return None
        own = (x.shape, x.stride(), self._cut_off, threads.available())
        call = int8_call(self._packed, *own, taken=taken, given=self.gives)
        if min(call.shape[2:]) < 1:
            return None  # torch says what is wrong
        if residual is None:
            return call
        same = residual.shape == call.shape and residual.dtype == torch.float32 and residual.is_cpu
        return call if same and residual.is_contiguous(memory_format=torch.channels_last) else None


_CUTS = frozenset(BOUNDS) - {"silu"}
"""Activations that the kernels know."""
_TOGETHER = 16
"""Channels of levels that are read and written at once."""


def hand_on_levels(graph: fx.GraphModule) -> None:
    """Let results be levels that nobody reads but kernels in integers, which all round them alike: a quarter of the
    memory, and the same bits."""
    found = {node: graph.get_submodule(str(node.target)) for node in graph.graph.nodes if node.op == "call_module"}
    for node, module in found.items():
        if not isinstance(module, IntegerConvolution) or not module.can_give or not node.users:
            continue
        readers = [found.get(user) for user in node.users if node not in user.args[1:]]
        roundings = {reader.takes if isinstance(reader, IntegerConvolution) else None for reader in readers}
        if len(readers) == len(node.users) and len(roundings) == 1:
            module.gives = roundings.pop()


def build_integers(layer: IntegerLayer, choice: str) -> nn.Module:
    """The kernel `choice` for `layer`."""
    return TorchInteger(layer) if choice == "torch" else IntegerConvolution(layer)
