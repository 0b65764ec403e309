"""A module whose forward leaves out some of its calls of ReLU, however they are written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_RELUS: frozenset[Callable[..., Any]] = frozenset(
    [functional.relu, functional.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_]
)
_innermost = threading.local()


class SkipsReLU(nn.Module):
    """Mixed into a module's class by `skip_relu`. `skipped`: numbers of the calls that pass their argument on.

    Calls are counted in each forward from 0, those of modules inside too, but not those of modules inside that skip
    some themselves: those count for themselves.
    """

    skipped: frozenset[int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Skipping(self.skipped):
            return super().forward(*args, **kwargs)


def skip_relu(module: nn.Module, call: int) -> None:
    """From now on forward leaves out this call, beside those that it left out before."""
    if not isinstance(module, SkipsReLU):
        module.__class__ = _skipping(type(module))
        vars(module)["skipped"] = frozenset()
    vars(module)["skipped"] |= {call}


@cache
def _skipping(cls: type[nn.Module]) -> type[nn.Module]:
    """As torch's own parametrizations do: a class of the same name, made where the module is."""
    return type(cls.__name__, (SkipsReLU, cls), {"__module__": cls.__module__})


class _Skipping(TorchFunctionMode):
    def __init__(self, calls: frozenset[int]) -> None:
        super().__init__()
        self.calls = calls
        self.done = 0

    def __enter__(self) -> Any:
        self.outer = getattr(_innermost, "mode", None)
        _innermost.mode = self
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        _innermost.mode = self.outer
        super().__exit__(*args)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RELUS and getattr(_innermost, "mode", None) is self:
            number, self.done = self.done, self.done + 1
            if number in self.calls:
                return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))
