"""Whether somebody looks at torch's operators, past which generated code goes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode as _mode  # pyright: ignore[reportPrivateUsage]


def observed(x: Tensor) -> bool:
    """Whether operators are recorded, traced, counted or compiled, or `x` is no plain tensor."""
    is_read = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return is_read or _mode() is not None or type(x) not in (Tensor, nn.Parameter)
