"""The images that every point of an analysis is evaluated on: chosen once, the same ones each time."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tersenet.data.bundle import Data, Loader, TensorLoader, first_tensor
from tersenet.data.imagefolder import FolderLoader
from tersenet.data.order import Order, generator
from tersenet.errors import TersenetError
from tersenet.graph.trace import tensors_in
from tersenet.train.batch import move


@dataclass(frozen=True)
class Images:
    """Batches in memory, on the device that they are evaluated on. `n` counts the samples."""

    split: str
    items: list[tuple[Any, Any]]
    n: int

    def __len__(self) -> int:
        return len(self.items)

    def batches(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """The same in every epoch."""
        return iter(self.items)

    @property
    def checksum(self) -> str:
        """Of every number in every batch: a folder's results are of these images and no others."""
        digest = hashlib.sha256()
        for tensor in tensors_in(self.items):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def choose(data: Data, split: str | None, samples: int, seed: int, device: torch.device) -> Images:
    """At most `samples` samples of a split, as they are evaluated: not augmented, where the loader is ours.

    Of a user's own loader whole batches are taken, as many as are needed for `samples`.

    Args:
        split: None: validation images, which were held out for choosing; or training images where there are none.

    Raises:
        TersenetError: data without this split, or without any to choose by.
    """
    if split is None:
        split = "validation" if data.validation is not None else "train"
        if data.validation is None and data.train is None:
            raise TersenetError(
                f"data {data.name!r} has neither validation nor training images to choose rates by; give some, or "
                "choose split: test, and measure the result on other images"
            )
    loader: Loader | None = getattr(data, split)
    if loader is None:
        have = [name for name in ("validation", "train", "test") if getattr(data, name) is not None]
        raise TersenetError(f"data {data.name!r} has no split {split!r}; it has {', '.join(have)}")
    # A user's random transforms draw from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = list(_some(loader, samples, seed))
    items = [(move(inputs, device, channels_last=True), move(targets, device)) for inputs, targets in found]
    return Images(split, items, sum(len(first_tensor(inputs)) for inputs, _ in items))


def _some(loader: Loader, samples: int, seed: int) -> Iterator[tuple[Any, Any]]:
    drawn = generator("sensitivity", seed)
    if isinstance(loader, (TensorLoader, FolderLoader)):
        indices = loader.order.indices
        chosen = indices[torch.randperm(len(indices), generator=drawn)[:samples]]
        still: Any = copy.copy(loader)
        still.order = Order(chosen, loader.order.batch_size, shuffle=False)
        still.augment = None if isinstance(loader, TensorLoader) else False
        yield from still.batches(0)
        return
    wanted = math.ceil(samples * len(loader) / loader.n)
    places = set(torch.randperm(len(loader), generator=drawn)[:wanted].tolist())
    yield from (batch for place, batch in enumerate(loader.batches(0)) if place in places)
