"""What the kernels' tests compare with: torch's convolution in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tersenet.kernels.host import host

ISAS = [isa.name for isa in host().isas()]
ACTIVATIONS = {"none": torch.nn.Identity(), "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
# L2 error in float32, relative to the convolution of absolute values; 3000 random layers stayed below a quarter of it.
ERRORS = {2: 5e-7, 4: 4e-6, 6: 2e-5}


def exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: tuple[int, int] = (0, 0),
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=padding)
    return ACTIVATIONS[activation](y if residual is None else y + residual)


def relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y - reference).norm() / reference.norm().clamp_min(1e-30))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, and in the same memory order."""
    return torch.equal(a, b) and a.stride() == b.stride()
