"""The kernels that can compute a layer, as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.kernels import threads
from tersenet.kernels.amx_call import PackedAmx, amx_call, pack_amx
from tersenet.kernels.gemm_call import gemm_call, pack_gemm
from tersenet.kernels.operator import winograd_conv2d
from tersenet.kernels.pack import Packed, pack, pack_domain
from tersenet.kernels.pack_sparse import SparsePacked, pack_sparse
from tersenet.kernels.sparse_operator import sparse_winograd_conv2d
from tersenet.kernels.winograd import BOUNDS, Call, Tables
from tersenet.kernels.winograd import call as prepared
from tersenet.lowering.activations import ACTIVATIONS
from tersenet.lowering.calls import key_of, watched
from tersenet.lowering.halves import HalfConvolution, HalfLinear
from tersenet.lowering.integer_modules import build_integers
from tersenet.lowering.integers import IntegerLayer
from tersenet.lowering.layers import AMX, AMX_HALF, GEMM, SPARSE, WINOGRAD, AnyLayer, DomainLayer, Layer, Pair
from tersenet.lowering.linears import LinearLayer, build_linear
from tersenet.lowering.segments import Step
from tersenet.ops.winograd import kronecker
from tersenet.ops.winograd_relu import Activation as Winograd
from tersenet.ops.winograd_relu import winograd_relu_conv2d

_ONEDNN: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
    "hardswish": ("hardswish", []),
}
"""What oneDNN calls them, and their numbers."""


class TorchConvolution(nn.Module):
    """Plain torch, weights in channels-last memory."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", layer.bias)
        self._settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self._activation = ACTIVATIONS[layer.activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, *self._settings)
        return self._activation(y if residual is None else y.add_(residual))


class TorchDomain(nn.Module):
    """The layer of the Winograd domain in plain torch."""

    weight: Tensor
    bias: Tensor | None
    aa: Tensor
    bb: Tensor

    def __init__(self, layer: DomainLayer) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight)
        self.register_buffer("bias", layer.bias)
        self.register_buffer("aa", kronecker(layer.at))
        self.register_buffer("bb", kronecker(layer.bt))
        self._settings = (layer.geometry, Winograd(layer.relu, threshold=layer.threshold))
        self._activation = ACTIVATIONS[layer.activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = winograd_relu_conv2d(x, self.weight, None, self.bias, self.aa, self.bb, *self._settings)
        return self._activation(y if residual is None else y.add_(residual))


class GemmConvolution(TorchConvolution):
    """A generated dense kernel, `gemm` or `amx`; plain torch for whoever watches operators, and for other
    types or memory orders."""

    def __init__(self, layer: Layer, choice: str) -> None:
        super().__init__(layer)
        weight = (layer.weight, layer.bias)
        moves = (layer.stride, layer.dilation, layer.groups)
        self._packed = pack_gemm(*weight) if choice == GEMM else pack_amx(*weight, *moves)
        self._moves, self._reuse = (self._packed.kernel, layer.stride, layer.padding), layer.reuse
        self._function = None if layer.activation in BOUNDS else ACTIVATIONS[layer.activation]
        self._cut_off = layer.activation if self._function is None else "none"
        self._calls: dict[tuple[Any, ...], Call | None] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if watched(x):
            return super().forward(x, residual)
        key = key_of(x, residual)
        if key not in self._calls:
            self._calls[key] = self._call(x, residual)
        call = self._calls[key]
        if call is None:
            return super().forward(x, residual)
        y = call.run(x, self._packed.tables, residual, residual if self._reuse else None)
        return y if self._function is None else self._function(y)

    def step(self, x: Tensor, residual: Tensor | None = None) -> Step | None:
        call = None if self._function is not None else self._call(x, residual)
        return None if call is None else Step(call, self._packed.tables, self._reuse and residual is not None)

    def _call(self, x: Tensor, residual: Tensor | None) -> Call | None:
        """None where the kernel does not take these tensors."""
        packed = self._packed
        if x.dtype != torch.float32 or not x.is_cpu or x.dim() != 4 or x.shape[1] != packed.in_channels:
            return None
        together = x.stride(1) == 1 or x.shape[1] == 1
        is_plane = isinstance(packed, PackedAmx) and packed.plane
        in_rows = packed.kernel[1] > 1 and x.shape[3] > 1 and not is_plane
        if not together or (in_rows and x.stride(3) != x.shape[1]):
            return None
        sizes, settings = (tuple(x.shape), x.stride()), (packed.out_channels, self._cut_off, threads.available())
        if isinstance(packed, PackedAmx):
            call = amx_call(packed.algorithm, *sizes, is_plane, packed.dilation, packed.groups, *self._moves, *settings)
        else:
            call = gemm_call(packed.algorithm, *sizes, residual is not None, *self._moves, *settings)
        if min(call.shape[2:]) < 1:
            return None  # torch says what is wrong
        if residual is None:
            return call
        same = residual.shape == call.shape and residual.dtype == torch.float32 and residual.is_cpu
        return call if same and residual.is_contiguous(memory_format=torch.channels_last) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> GemmConvolution:
        return self  # it never changes


class DirectConvolution(nn.Module):
    """oneDNN's convolution with its weight packed once, bias, sum and activation in one pass."""

    def __init__(self, layer: Layer, size: tuple[int, ...]) -> None:
        super().__init__()
        weight = layer.weight.contiguous().to_mkldnn()
        settings = (layer.padding, layer.stride, layer.dilation, layer.groups)
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # pyright: ignore
        # Not a buffer: a packed tensor can be neither moved nor saved.
        self._weight = reorder(weight, *settings, list(size))
        self._bias = layer.bias
        self._settings = tuple(list(one) if isinstance(one, tuple) else one for one in settings)
        # With a sum, oneDNN's operator knows no activation but ReLU.
        self._apart = layer.residual and layer.activation not in ("none", "relu")
        self._function = ACTIVATIONS[layer.activation]
        name, scalars = _ONEDNN[layer.activation]
        self._post = (name, scalars, "")
        self._reuse = layer.reuse
        unary = "relu" if layer.activation == "relu" else None
        self._binary = ("add", 1.0, unary, [], "")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        run = torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return run.default(x, self._weight, self._bias, *self._settings, *self._post)
        if self._reuse and not watched(x) and residual.is_contiguous(memory_format=torch.channels_last):
            run = torch.ops.mkldnn._convolution_pointwise_
            y = run.binary(residual, x, self._weight, self._bias, *self._settings, *self._binary)
        else:
            y = run.binary(x, residual, self._weight, self._bias, *self._settings, *self._binary)
        return self._function(y) if self._apart else y

    def __deepcopy__(self, memo: dict[int, Any]) -> DirectConvolution:
        return self  # it never changes


class WinogradConvolution(nn.Module):
    """The generated kernels, with their weight packed once. The way through torch's operator takes longer than a small
    layer, and is taken once for each size."""

    def __init__(self, packed: Packed | SparsePacked, padding: Pair, activation: str, reuse: bool = False) -> None:
        super().__init__()
        self._packed = packed
        self._padding, self._reuse = padding, reuse
        self._function = None if activation in BOUNDS else ACTIVATIONS[activation]
        self._activation = activation if self._function is None else "none"
        lists = (packed.list, packed.starts) if isinstance(packed, SparsePacked) else ()
        self._tables = Tables(packed.weight, packed.bias, *lists)
        self._calls: dict[tuple[Any, ...] | None, Call] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        key = None if watched(x) else key_of(x, residual)
        call = self._calls.get(key)
        if call is not None:
            y = call.run(x, self._tables, residual, residual if self._is_reused(residual) else None)
        else:
            y = self._checked(x, residual)
            if key is not None and x.stride(1) == 1 and (residual is None or residual.stride(1) == 1):
                self._calls[key] = self._call(x, residual)
        return y if self._function is None else self._function(y)

    def step(self, x: Tensor, residual: Tensor | None = None) -> Step | None:
        self._checked(x, residual)
        ordered = x.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
        if self._function is not None or not ordered:
            return None
        return Step(self._call(x, residual), self._tables, self._is_reused(residual))

    def _is_reused(self, residual: Tensor | None) -> bool:
        return residual is not None and self._reuse and residual.is_contiguous(memory_format=torch.channels_last)

    def _checked(self, x: Tensor, residual: Tensor | None) -> Tensor:
        packed, settings = self._packed, (self._padding, residual, self._activation)
        if isinstance(packed, SparsePacked):
            return sparse_winograd_conv2d(x, packed, *settings)
        return winograd_conv2d(x, packed, *settings)

    def _call(self, x: Tensor, residual: Tensor | None) -> Call:
        strides = None if residual is None else residual.stride()
        packed, count = self._packed, threads.available()
        settings = (self._padding, packed.out_channels, self._activation, count)
        return prepared(packed.algorithm, x.shape, x.stride(), strides, *settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> WinogradConvolution:
        return self  # it never changes


def reference(layer: AnyLayer) -> nn.Module:
    """`layer` by torch alone: it runs everywhere, and the others are judged by it."""
    if isinstance(layer, LinearLayer):
        return build_linear(layer, "torch")
    if isinstance(layer, IntegerLayer):
        return build_integers(layer, "torch")
    return TorchDomain(layer) if isinstance(layer, DomainLayer) else TorchConvolution(layer)


def build(layer: AnyLayer, choice: str, size: tuple[int, ...]) -> nn.Module:
    """The kernel `choice` for `layer`, packed for inputs of `size` (N, C, H, W); it takes any batch."""
    if choice == "torch":
        return reference(layer)
    if isinstance(layer, LinearLayer):
        return HalfLinear(layer) if choice == AMX_HALF else build_linear(layer, choice)
    if isinstance(layer, IntegerLayer):
        return build_integers(layer, choice)
    if isinstance(layer, DomainLayer):
        made = layer.algorithm(choice)
        settings = (layer.bias, made.m, made.isa.name, made.points, made.relu)
        packed = (pack_sparse if choice in SPARSE else pack_domain)(
            layer.weight, *settings, made.weight, layer.threshold
        )
        return WinogradConvolution(packed, layer.sides, layer.activation, layer.reuse)
    if choice == "direct":
        return DirectConvolution(layer, size)
    if choice == AMX_HALF:
        return HalfConvolution(layer, TorchConvolution(layer))
    if choice in (GEMM, AMX):
        return GemmConvolution(layer, choice)
    m, kept = WINOGRAD[choice]
    packed = pack(layer.weight, layer.bias, m, kept=kept)
    return WinogradConvolution(packed, layer.padding, layer.activation, layer.reuse)
