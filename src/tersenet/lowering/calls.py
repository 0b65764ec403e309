"""When a module may call generated code past torch's operators, and what an earlier check of its tensors holds for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersenet.kernels.observed import observed


def watched(x: Tensor) -> bool:
    """Whether somebody looks at operators, or `x` is no plain tensor: then it has to be an operator of torch."""
    return torch.is_grad_enabled() or observed(x)


def key_of(x: Tensor, residual: Tensor | None) -> tuple[Any, ...]:
    """What decides whether an earlier check, and what was worked out then, holds."""
    other = None if residual is None else (residual.dtype, residual.device, residual.shape, residual.stride())
    return x.dtype, x.device, x.shape, x.stride(), other, torch.get_num_threads()
