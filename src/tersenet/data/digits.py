"""The 1,797 handwritten digits that come with scikit-learn: 8x8 gray, values 0..16, no download.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tersenet.data.augment import CropFlip
from tersenet.data.order import stratified_split

CLASSES = 10
AUGMENT = CropFlip(pad=1, flip=False)
TEST_SHARE = 0.2


def read() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels: (N, 1, 8, 8) uint8 and (N,) int64.

    scikit-learn has no split of its own for them; ours is stratified, 1,438 to train and 359 to test, and never
    changes.
    """
    # scikit-learn takes a second to import.
    from sklearn.datasets import load_digits  # pyright: ignore[reportUnknownVariableType]

    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(np.asarray(classes, np.int64))
    train, test = stratified_split(labels, TEST_SHARE, seed=0, what="digits test share")
    train = train.sort().values
    return images[train], labels[train], images[test], labels[test]
