"""Whether Triton kernels run here, and why not."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch

from tersenet.errors import TersenetError

_CAPABILITY = (8, 0)  # before, tensor cores know neither bfloat16 nor TF32, and nothing was tried


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU, as TRITON_INTERPRET=1 asks for: to test, not for speed."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "y", "yes")


def problem(device: torch.device | None = None) -> str | None:
    """Why Triton kernels don't run on `device` (by default the current GPU), or None if they do."""
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:
        return f"triton does not load ({error}); torch's builds for CUDA on Linux bring it"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU; TRITON_INTERPRET=1 runs them on the CPU, slowly"
    if torch.version.hip is not None:
        return "this torch is for AMD's GPUs, on which they were not tried"
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        return f"the GPU has compute capability {found[0]}.{found[1]}; they need {_CAPABILITY[0]}.{_CAPABILITY[1]}"
    return None


@functools.cache
def kernels() -> Any:
    """The module of the kernels. Raises: TersenetError where they don't run."""
    if reason := problem():
        raise TersenetError(f"no Triton kernels: {reason}. torch's own convolution works everywhere")
    return importlib.import_module("tersenet.kernels.gpu.winograd_kernels")
