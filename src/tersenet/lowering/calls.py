"""When a module may call generated code past torch's operators, and what an earlier check of its tensors holds for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode as _mode  # pyright: ignore[reportPrivateUsage]


def watched(x: Tensor) -> bool:
    """Whether somebody looks at operators, or `x` is no plain tensor: then it has to be an operator of torch."""
    watched = torch.compiler.is_compiling() or torch.is_grad_enabled() or _mode() is not None
    return watched or type(x) is not Tensor


def key_of(x: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
    """What decides whether an earlier check, and what was worked out then, holds."""
    other = None if residual is None else (residual.dtype, residual.device, residual.shape, residual.stride())
    return x.dtype, x.device, x.shape, x.stride(), other, torch.get_num_threads()
