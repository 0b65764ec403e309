"""What a convolution reads and puts out at sampled positions, one row each: what its moments are made of.

Source: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 4.1 (sampling).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def draw_positions(images: int, places: int, per_image: int, generator: torch.Generator) -> Tensor:
    """(images, min(per_image, places)) int64: flat output positions for each image, without repetition.

    Differs: the published code draws ten positions per batch, with repetition, and shares them between its images.
    """
    if per_image >= places:
        return torch.arange(places).expand(images, places)
    return torch.rand(images, places, generator=generator).sort(dim=1, stable=True).indices[:, :per_image]


def output_rows(y: Tensor, positions: Tensor | None = None) -> Tensor:
    """(B, O, H, W) -> (B * P, O): outputs at flat positions (B, P) of each image, or at all."""
    flat = y.flatten(2)
    if positions is not None:
        flat = flat.gather(2, positions.to(y.device)[:, None].expand(-1, y.shape[1], -1))
    return flat.transpose(1, 2).flatten(0, 1)


def conv_rows(
    x: Tensor,
    kernel: tuple[int, int],
    positions: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """(B, C, H, W) -> (B * P, C * kernel height * kernel width): what a zero-padded convolution reads.

    `positions` (B, P) are flat positions in its output, all when None. Rows are in the order of `output_rows`.
    """
    if positions is None:
        return F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
    images, channels = x.shape[:2]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    width = x.shape[3]
    out_width = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    positions = positions.to(x.device)
    top, left = positions // out_width * stride[0], positions % out_width * stride[1]
    down = torch.arange(kernel[0], device=x.device) * dilation[0]
    right = torch.arange(kernel[1], device=x.device) * dilation[1]
    index = (top[..., None, None] + down[:, None]) * width + left[..., None, None] + right
    count = positions.shape[1]
    values = x.flatten(2).gather(2, index.view(images, 1, -1).expand(-1, channels, -1))
    return values.view(images, channels, count, -1).transpose(1, 2).reshape(images * count, -1)
