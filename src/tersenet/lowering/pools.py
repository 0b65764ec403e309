"""Pools of a lowered network on generated kernels.

torch's own max pool also writes where each maximum was, and its mean over an image takes as long as a layer to get
under way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels import threads
from tersenet.kernels.compiled import kernels
from tersenet.kernels.host import host
from tersenet.kernels.mean_call import mean_call
from tersenet.kernels.pool import Pool
from tersenet.kernels.pool_call import NO_TABLES, Windows, pool_call
from tersenet.lowering.calls import key_of, watched
from tersenet.lowering.segments import Step

_MAX_POOL = torch.ops.aten.max_pool2d.default
_MEAN_POOL, _FLATTEN = torch.ops.aten.adaptive_avg_pool2d.default, torch.ops.aten.flatten.using_ints
_FIELDS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")


class MaxPool(nn.Module):
    """The generated kernel; torch's for whoever watches operators, and for other types or memory orders."""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self._windows = windows
        self._steps: dict[tuple[Any, ...], Step] = {}

    def forward(self, x: Tensor) -> Tensor:
        step = None if watched(x) else self.step(x)
        if step is None:
            own = self._windows
            return F.max_pool2d(x, own.size, own.step, own.padding, ceil_mode=own.ceil)
        return step.call.run(x, NO_TABLES, None)

    def step(self, x: Tensor) -> Step | None:
        if not _fits(x):
            return None
        key = key_of(x, None)
        if key not in self._steps:
            half = x.dtype == torch.bfloat16
            call = pool_call(tuple(x.shape), x.stride(), self._windows, threads.available(), half=half)
            self._steps[key] = Step(call, NO_TABLES)
        return self._steps[key]


class MeanPool(nn.Module):
    """The mean of each channel's image, (N, C, 1, 1) or, if `flat`, (N, C), on the kernel; torch's as above."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self._flat = flat
        self._steps: dict[tuple[Any, ...], Step] = {}

    def forward(self, x: Tensor) -> Tensor:
        step = None if watched(x) else self.step(x)
        y = F.adaptive_avg_pool2d(x, 1) if step is None else step.call.run(x, NO_TABLES, None)
        return y.flatten(1) if self._flat else y

    def step(self, x: Tensor) -> Step | None:
        if not _fits(x) or not x.numel():
            return None
        key = key_of(x, None)
        if key not in self._steps:
            call = mean_call(tuple(x.shape), x.stride(), threads.available(), x.dtype == torch.bfloat16)
            self._steps[key] = Step(call, NO_TABLES, flat=self._flat)
        return self._steps[key]


def _fits(x: Tensor) -> bool:
    """Whether the kernels take these images."""
    is_known = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and host().amx_problem is None)
    return is_known and x.dim() == 4 and x.is_cpu and (x.stride(1) == 1 or x.shape[1] == 1)


def with_pools(graph: fx.GraphModule) -> None:
    """Put `MaxPool` and `MeanPool` in the place of pools of images; where there are no kernels, nothing happens."""
    found = {node: module for node in graph.graph.nodes if (module := _pool(node)) is not None}
    if not found or not _has_kernels():
        return
    for number, (node, module) in enumerate(found.items()):
        graph.add_module(f"pool_{number}", module)
        with graph.graph.inserting_before(node):
            source: Any = node.args[0]
            is_flat = node.target is _FLATTEN
            call = graph.graph.call_module(f"pool_{number}", (source.args[0] if is_flat else source,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
        if is_flat:
            graph.graph.erase_node(source)
    graph.recompile()


def _pool(node: fx.Node) -> nn.Module | None:
    windows = _windows(node)
    if windows is not None:
        return MaxPool(windows)
    source = node.args[0] if node.target is _FLATTEN and tuple(node.args[1:]) in ((1,), (1, -1)) else None
    if isinstance(source, fx.Node) and len(source.users) == 1 and _is_mean(source) and not node.kwargs:
        return MeanPool(flat=True)
    if _is_mean(node) and not any(user.target is _FLATTEN and len(node.users) == 1 for user in node.users):
        return MeanPool(flat=False)
    return None


def _is_mean(node: fx.Node) -> bool:
    """Of each channel's image, of float32 ones."""
    value = node.meta.get("val")
    if node.target is not _MEAN_POOL or value is None or value.dim() != 4 or value.dtype != torch.float32:
        return False
    return list(node.args[1:2]) == [[1, 1]] and not node.kwargs


def _windows(node: fx.Node) -> Windows | None:
    """Those of a max pool of float32 images without dilation."""
    value = node.meta.get("val")
    if node.target is not _MAX_POOL or value is None or value.dim() != 4 or value.dtype != torch.float32:
        return None
    given: dict[str, Any] = {**dict(zip(_FIELDS, node.args, strict=False)), **node.kwargs}
    if any(one != 1 for one in given.get("dilation", (1,))):
        return None
    size = _pair(given["kernel_size"])
    step = _pair(given["stride"]) if given.get("stride") else size
    return Windows(size, step, _pair(given.get("padding", (0,))), bool(given.get("ceil_mode", False)))


def _pair(value: Any) -> tuple[int, int]:
    return int(value[0]), int(value[-1])


def _has_kernels() -> bool:
    try:
        kernels(Pool(host().isa()))
    except TersenetError:
        return False
    return True
