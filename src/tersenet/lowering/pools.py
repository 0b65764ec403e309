"""Max pools of a lowered network on the generated kernel: torch's own also writes where each maximum was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.kernels import threads
from tersenet.kernels.compiled import kernels
from tersenet.kernels.host import host
from tersenet.kernels.pool import Pool
from tersenet.kernels.pool_call import NO_TABLES, Windows, pool_call
from tersenet.kernels.winograd import Call
from tersenet.lowering.calls import key_of, watched

_MAX_POOL = torch.ops.aten.max_pool2d.default
_FIELDS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")


class MaxPool(nn.Module):
    """The generated kernel; torch's for whoever watches operators, and for other types or memory orders."""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self._windows = windows
        self._calls: dict[tuple[Any, ...], Call] = {}

    def forward(self, x: Tensor) -> Tensor:
        ordered = x.dim() == 4 and x.is_cpu and x.dtype == torch.float32 and (x.stride(1) == 1 or x.shape[1] == 1)
        if not ordered or watched(x):
            own = self._windows
            return F.max_pool2d(x, own.size, own.step, own.padding, ceil_mode=own.ceil)
        key = key_of(x, None)
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = pool_call(tuple(x.shape), x.stride(), self._windows, threads.available())
        return call.run(x, NO_TABLES, None)


def with_pools(graph: fx.GraphModule) -> None:
    """Put `MaxPool` in the place of max pools of images; where there are no kernels, nothing happens."""
    found = {node: windows for node in graph.graph.nodes if (windows := _windows(node)) is not None}
    if not found or not _has_kernels():
        return
    for number, (node, windows) in enumerate(found.items()):
        graph.add_module(f"pool_{number}", MaxPool(windows))
        with graph.graph.inserting_before(node):
            call = graph.graph.call_module(f"pool_{number}", (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.recompile()


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
