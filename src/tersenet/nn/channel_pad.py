"""Shortcut A of the CIFAR ResNets: no parameters, only subsampling and zero channels."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import pad

from tersenet.errors import TersenetError


class ZeroPadShortcut(nn.Module):
    """(N, C, H, W) -> (N, before + C + after, ceil(H / stride), ceil(W / stride)).

    Keeps every `stride`-th row and column, and adds `before` and `after` channels of zeros. The three numbers are plain
    attributes: a change of the network's channels rewrites them.

    Source: He et al. 2016, Deep Residual Learning, section 4.2 (option A).
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        """Raises: TersenetError for a negative number of channels (padding by it would crop) or a stride below 1."""
        super().__init__()
        if min(before, after) < 0 or stride < 1:
            raise TersenetError(
                f"ZeroPadShortcut(before={before}, after={after}, stride={stride}): "
                "before and after must be at least 0, stride at least 1"
            )
        self.before = before
        self.after = after
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, stride={self.stride}"
