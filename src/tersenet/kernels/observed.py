"""Whether somebody looks at torch's operators, past which generated code goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode as _mode  # pyright: ignore[reportPrivateUsage]


def observed(x: Tensor) -> bool:
    """Whether operators are recorded, counted or compiled, or `x` is no plain tensor."""
    return torch.compiler.is_compiling() or _mode() is not None or type(x) not in (Tensor, nn.Parameter)
