"""Multiply-adds, parameters and bytes of a network, in total and per layer.

1 MAC is one multiply-add. Convolutions, linear layers and matrix products are counted, by torch's own flop formulas
(2 flops per MAC); bias, normalisation, activations and pooling are not. Padding counts as if it were data.
Convolutions by Winograd's algorithm count as direct ones: `winograd_table` has their multiplications.
Counts are for one forward of the example as given: an example with a batch of 1 gives the figures that papers state.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd  # pyright: ignore[reportPrivateUsage]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tersenet.measuring.meta import meta_copy, meta_example, run_on_meta, tensors_in
from tersenet.nn.winograd_quantizer import directly

# Operators that multiply and add; one of these without a formula is reported, never silently zero.
_HEAVY = re.compile(
    r"conv(?!ert)|matmul|mm(_|$)|mv(_|$)|(^|_)v?dot(_|$)|(^|_)(bi|tri)?linear$|lstm|gru|rnn|attention|cdist|fft|linalg"
)
_LIGHT = re.compile(r"^upsample_")
_OWN_NAMESPACES = ("aten", "prim", "prims")


@dataclass(frozen=True)
class LayerCost:
    """One layer in one forward of the example. `kind` names operator and kernel (`conv 3x3`); `params` has the bias."""

    kind: str
    in_channels: int
    out_channels: int
    macs: int
    params: int


def count_macs(model: nn.Module, example: Any) -> tuple[int, list[str]]:
    """The MACs of one forward, and the operators that do arithmetic but have no formula (`aten._trilinear`).

    Works on a copy without data: the model and its mode, device and hooks' state stay as they are.

    Raises: TersenetError if the network needs the values of its tensors, or does not take this example.
    """
    with directly(), _Uncounted() as uncounted, _counter() as counter:
        run_on_meta(meta_copy(model), meta_example(example))
    return counter.get_total_flops() // 2, sorted(uncounted.names)


def layer_table(model: nn.Module, example: Any) -> dict[str, LayerCost]:
    """The cost of every convolution and linear layer that runs, and of every module with matrix products of its own, in
    the order in which they finish. The MACs of all rows add up to `count_macs`; a layer used twice counts twice.

    Keys are module paths in the model ("" is the model itself, for products in its own forward).

    Raises: as `count_macs`.
    """
    copied = meta_copy(model)
    with directly(), _counter() as counter:
        tally = _Tally(lambda: counter.get_total_flops() // 2)
        tally.watch(copied, "")
        run_on_meta(copied, meta_example(example))
    return tally.rows


def params_of(model: nn.Module) -> int:
    """The number of parameters; one that is used in several places counts once, buffers don't count."""
    return sum(parameter.numel() for parameter in model.parameters())


def bytes_of(model: nn.Module) -> int:
    """The bytes of all parameters and buffers; shared storage counts once."""
    storages = {tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages)


def _matrix_vector_flops(matrix: Any, vector: Any, **_: Any) -> int:
    return 2 * prod(matrix)


def _add_matrix_vector_flops(bias: Any, matrix: Any, vector: Any, **_: Any) -> int:
    return 2 * prod(matrix)


# torch's table lacks these, and writes a 1-d operand of `@` as one of them.
_MORE_FORMULAS = {
    torch.ops.aten.mv: _matrix_vector_flops,
    torch.ops.aten.addmv: _add_matrix_vector_flops,
    torch.ops.aten.dot: _matrix_vector_flops,
    torch.ops.aten.vdot: _matrix_vector_flops,
}


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS)


class _Uncounted(TorchDispatchMode):
    """Collects the heavy operators that the flop counter, entered after it, has no formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._priced = set(_counter().flop_registry)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        namespace, _, name = str(packet).partition(".")
        strange = namespace not in _OWN_NAMESPACES
        if packet not in self._priced and (strange or (_HEAVY.search(name) and not _LIGHT.search(name))):
            self.names.add(str(packet))
        return func(*args, **(kwargs or {}))


@dataclass
class _Tally:
    """Charges every module for the MACs of its forward, less those of the modules it called."""

    macs_so_far: Callable[[], int]
    rows: dict[str, LayerCost] = field(default_factory=dict)
    _open: list[tuple[int, int]] = field(default_factory=list)  # (MACs at entry, charged to modules inside)
    _watched: set[nn.Module] = field(default_factory=set)

    def watch(self, module: nn.Module, path: str) -> None:
        if module in self._watched:
            return
        self._watched.add(module)
        module.register_forward_pre_hook(lambda module, inputs: self._open.append((self.macs_so_far(), 0)))
        module.register_forward_hook(lambda module, inputs, output: self._close(module, path, inputs, output))
        if _is_layer(module):  # what is inside one, such as a parametrisation of its weight, is part of it
            return
        for name, child in module.named_children():
            self.watch(child, f"{path}.{name}" if path else name)

    def _close(self, module: nn.Module, path: str, inputs: Any, output: Any) -> None:
        start, inside = self._open.pop()
        total = self.macs_so_far() - start
        if self._open:
            outer_start, outer_inside = self._open.pop()
            self._open.append((outer_start, outer_inside + total))
        own = total - inside
        if own == 0 and not _is_layer(module):
            return
        before = self.rows.get(path)
        self.rows[path] = _cost(module, inputs, output, own + (before.macs if before else 0))


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd | nn.Linear)


def _cost(module: nn.Module, inputs: Any, output: Any, macs: int) -> LayerCost:
    params = sum(parameter.numel() for parameter in module.parameters(recurse=_is_layer(module)))
    if isinstance(module, _ConvNd):
        return LayerCost(_conv_kind(module), module.in_channels, module.out_channels, macs, params)
    if isinstance(module, nn.Linear):
        return LayerCost("linear", module.in_features, module.out_features, macs, params)
    return LayerCost(type(module).__name__, _channels(inputs), _channels(output), macs, params)


def _conv_kind(conv: _ConvNd) -> str:
    kernel = "x".join(str(size) for size in conv.kernel_size)
    if isinstance(conv, _ConvTransposeNd):
        return f"transposed {kernel}"
    if conv.groups == 1:
        return f"conv {kernel}"
    return f"depthwise {kernel}" if conv.groups == conv.in_channels else f"grouped {kernel}"


def _channels(value: Any) -> int:
    """Axis 1 of images, the last axis of everything else."""
    tensors: list[Tensor] = tensors_in(value)
    if not tensors or tensors[0].dim() == 0:
        return 0
    return tensors[0].shape[1 if tensors[0].dim() == 4 else -1]
