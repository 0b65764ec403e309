"""Losses on a few training batches, for scores that need to see data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tersenet.data.bundle import Data, first_tensor
from tersenet.errors import TersenetError
from tersenet.train.batch import cross_entropy, forward, move

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass
class CalibrationLosses:
    """The loss of each of the first `batches` training batches of epoch 0, computed when it is asked for.

    The same batches every time: their order follows from the data's seed. `images` counts those seen on this rank.

    Raises:
        TersenetError: no data, or data without a training split.
    """

    model: nn.Module
    data: Data | None
    batches: int
    device: torch.device
    images: int = 0

    def __iter__(self) -> Iterator[Tensor]:
        if self.data is None or self.data.train is None:
            raise TersenetError("scores from data need training images: give some, such as --data digits, or use l2")
        loss = self.data.loss or cross_entropy
        self.images = 0
        for inputs, targets in itertools.islice(self.data.train.batches(0), self.batches):
            self.images += len(first_tensor(inputs))
            yield loss(forward(self.model, move(inputs, self.device)), move(targets, self.device))
