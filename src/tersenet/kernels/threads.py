"""Generated code on the threads that torch already has: one pool, and `torch.set_num_threads` holds for it.

torch's CPU library is linked with an OpenMP runtime; its `GOMP_parallel` runs any function on that pool. Calls leave
Python's lock, and may come from several Python threads at once: each has its own team, as in torch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_LIBRARY = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")


class Task:
    """A compiled `void task(context)`, which shares its work with other threads that run it on the same context."""

    def __init__(self, address: int, owner: Any) -> None:
        """Args: owner: what holds the code; it lives as long as this."""
        self.address, self._owner = address, owner
        self._function = _Function(address)

    def run(self, context: int, threads: int) -> None:
        """Run on up to `threads` threads; `context` is an address. Returns when all of them are done."""
        parallel = runtime()
        if threads > 1 and parallel is not None:
            parallel(self.address, context, threads, 0)
        else:
            self._function(context)


def available() -> int:
    """How many threads a call may use: torch's number, or 1 where torch's pool can't be used."""
    return torch.get_num_threads() if runtime() is not None else 1


@functools.cache
def runtime() -> Any:
    """`GOMP_parallel` of the runtime that torch is linked with, or None.

    Symbols are looked up in torch's library and then in what it depends on, so that another OpenMP runtime in the same
    process (scikit-learn brings one) is never taken.
    """
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _LIBRARY)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.restype = None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return function
