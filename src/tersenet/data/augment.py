"""Batched augmentation of byte images, and their normalisation.

In numpy: a batch takes less than a millisecond, and on busy cores waiting for torch's threads costs more than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersenet.data.registry import MeanStd


@dataclass(frozen=True)
class CropFlip:
    """Each image shifted by up to `pad` pixels, black coming in at the border, and mirrored half of the time.

    Equal in distribution to torchvision's RandomHorizontalFlip and RandomCrop(size, padding=pad) before ToTensor and
    Normalize: the border is black *before* normalisation, so afterwards it is -mean/std, not 0.
    """

    pad: int
    flip: bool

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Random choices for n images: (n, 3) of row offset, column offset (both 0..2 pad) and mirrored (0 or 1)."""
        offsets = torch.randint(0, 2 * self.pad + 1, (n, 2), generator=generator)
        mirrored = torch.randint(0, 2, (n, 1), generator=generator) * int(self.flip)
        return torch.cat([offsets, mirrored], 1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment (N, C, H, W) uint8 images by their (N, 3) draws; same shape, a new tensor."""
        pixels = images.numpy()
        rows, columns, mirrored = draws.numpy().T
        n, channels, height, width = pixels.shape
        padded = np.zeros((n, channels, height + 2 * self.pad, width + 2 * self.pad), np.uint8)
        middle = padded[:, :, self.pad : self.pad + height, self.pad : self.pad + width]
        middle[:] = pixels
        flipped = np.flatnonzero(mirrored)
        middle[flipped] = pixels[flipped, ..., ::-1]
        # Every window is a view; the indexing copies each image's own one.
        windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
        return torch.from_numpy(windows[np.arange(n), :, rows, columns])


def to_float(images: Tensor, normalise: MeanStd) -> Tensor:
    """(N, C, H, W) bytes -> float32 (x / 255 - mean) / std, rounded as torchvision's ToTensor and Normalize do."""
    mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in normalise)
    pixels = images.numpy().astype(np.float32)
    pixels /= np.float32(255)
    pixels -= mean
    pixels /= std
    return torch.from_numpy(pixels)
