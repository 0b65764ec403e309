"""The training images that layers are calibrated on: the same ones in every pass, loaded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tersenet.calibration.store import Store
from tersenet.data.bundle import Loader, first_tensor
from tersenet.errors import TersenetError
from tersenet.train.batch import move

_OTHERS = 128  # images kept for measuring


@dataclass
class Images:
    """The first `images` training images of epoch 0 and `positions` of each layer's outputs for each of them.

    Both follow from `seed` and are the same in every pass. They are loaded once.
    """

    loader: Loader
    images: int
    positions: int
    seed: int
    device: torch.device
    _loaded: Store | None = field(default=None, init=False, repr=False)
    _count: int = field(default=0, init=False)
    _others: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]], init=False, repr=False)

    def batches(self) -> Iterator[tuple[Any, ...]]:
        """Inputs of the network, at most `images` of them.

        Raises:
            TersenetError: batches of named inputs.
        """
        loaded = self._load()
        for number in range(self._count):
            yield tuple(move(loaded.get(str(number)), self.device))

    def others(self, count: int) -> list[tuple[Any, ...]]:
        """At most `count` (128) training images that are not among `batches`; of those where there are no more.

        Copies, as `batches` gives them.
        """
        self._load()
        return list(_first(self._others or self.batches(), count))

    def seen(self) -> int:
        """How many there are."""
        return min(self.images, self.loader.n)

    def _load(self) -> Store:
        if self._loaded is not None:
            return self._loaded
        loaded = Store()
        count, left, others = 0, self.images, list[tuple[Any, ...]]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for inputs, _ in self.loader.batches(0):
                if isinstance(inputs, dict):
                    raise TersenetError("calibration takes batches of one tensor or of several in order, not a dict")
                several = tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)
                if left > 0:
                    # Copies: a slice would be kept with all that it is a part of.
                    loaded.put(str(count), tuple(x[:left].clone() for x in several))
                    count += 1
                if len(first_tensor(several)) > left:
                    rest = [x[max(left, 0) : left + _OTHERS].clone() for x in several]
                    others.append(tuple(move(rest, self.device)))
                left -= len(first_tensor(several))
                if left <= -_OTHERS:
                    break
        self._loaded, self._count, self._others = loaded, count, others
        return loaded


def _first(batches: Iterable[tuple[Any, ...]], count: int) -> Iterator[tuple[Any, ...]]:
    for batch in batches:
        yield tuple(x[:count].clone() for x in batch)
        count -= len(first_tensor(batch))
        if count <= 0:
            return
