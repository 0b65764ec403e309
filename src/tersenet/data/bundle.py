"""What every data set looks like to the rest of the package: loaders of seeded batches, bundled with their facts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tersenet.data.augment import CropFlip, to_float
from tersenet.data.order import Order, generator
from tersenet.data.registry import MeanStd, normalisation
from tersenet.errors import TersenetError


@runtime_checkable
class Loader(Protocol):
    """Batches by epoch. The same epoch gives the same batches, bit for bit, whatever was loaded before."""

    @property
    def n(self) -> int:
        """Samples in the set, all ranks together."""
        ...

    def __len__(self) -> int:
        """Batches per epoch on this rank."""
        ...

    def batches(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """(inputs, targets) of one epoch."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set. `test` only ever measures; what chooses (a checkpoint, a setting) looks at `validation`."""

    name: str
    train: Loader | None
    validation: Loader | None
    test: Loader | None
    classes: int | None
    shape: tuple[int, ...]
    """of one input: (C, H, W) of an image"""
    normalise: MeanStd | None
    """mean and standard deviation per channel that the loaders have applied; None where that is not ours to know"""
    loss: Callable[[Any, Any], Tensor] | None = None
    """(outputs, targets) -> scalar; None: cross entropy"""
    metric: Callable[[Any, Any], Tensor] | None = None
    """(outputs, targets) -> one score per sample (N,); None: top-1 and top-5"""


class TensorLoader:
    """A whole image set as one tensor of bytes, augmented and normalised batch by batch.

    Args:
        images: (N, C, H, W) uint8, on the CPU.
        labels: (N,) int64.
        batch_size: images per batch of this rank.
        shuffle: a training set: shuffled in each epoch, the same number of batches on every rank.
        augment: random crop and flip, drawn for each image anew in each epoch.
        normalise: a name of `NORMALISATION`, or mean and standard deviation per channel.
        rank, world: this rank's share is disjoint from the others'.
        limit: only the first so many samples.
        indices: only these samples, in this order.

    Raises:
        TersenetError: the tensors are not of these types and shapes.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        shuffle: bool = False,
        augment: CropFlip | None = None,
        normalise: str | MeanStd = "none",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        limit: int | None = None,
        indices: Tensor | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise TersenetError(f"images must be uint8 (N, C, H, W), not {images.dtype} {tuple(images.shape)}.")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise TersenetError(
                f"labels must be int64 ({len(images)},) as there are {len(images)} images, "
                f"not {labels.dtype} {tuple(labels.shape)}."
            )
        chosen = (torch.arange(len(images)) if indices is None else indices)[:limit]
        self.images = images
        self.labels = labels
        self.order = Order(chosen, batch_size, shuffle, seed, rank, world)
        self.augment = augment
        self.normalise = normalisation(normalise, images.shape[1])

    @property
    def n(self) -> int:
        return len(self.order.indices)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """float32 (batch, C, H, W) and int64 (batch,), both on the CPU."""
        draws = None
        if self.augment is not None:
            # Drawn for every sample of the set, not for this rank's: the same at any world size.
            draws = self.augment.draw(len(self.images), generator("augment", self.order.seed, epoch))
        for index in self.order.epoch(epoch):
            images = torch.from_numpy(self.images.numpy()[index.numpy()])
            if self.augment is not None and draws is not None:
                images = self.augment(images, draws[index])
            yield to_float(images, self.normalise), self.labels[index]


class LoaderAdapter:
    """A user's DataLoader, or anything of known length that yields (inputs, targets), as a `Loader`.

    A torch sampler gets a generator seeded with (seed, epoch), and what has `set_epoch` is told the epoch: the order
    doesn't depend on what ran before. Random transforms inside the dataset draw from torch's global generator, which
    `fit` seeds at the start of each epoch. Unless the sampler shares out samples itself (DistributedSampler),
    rank r takes the batches r, r + world, ...

    Args:
        loader: re-iterable, with a length.
        name: what messages call it.
        train: every rank gets the same number of batches.

    Raises:
        TersenetError: it has no length or no batches, or is a Dataset rather than a loader.
    """

    def __init__(
        self, loader: Any, *, name: str = "data", train: bool = False, seed: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        if isinstance(loader, Dataset):
            raise TersenetError(
                f"{name} is a Dataset, which has no batches; wrap it: DataLoader(dataset, batch_size=...)."
            )
        self.loader = loader
        self.name = name
        self.train = train
        self.seed = seed
        try:
            total: int | None = len(loader)
        except TypeError:
            total = None
        if total is None or not hasattr(loader, "__iter__"):
            raise TersenetError(
                f"{name} is a {type(loader).__name__}; it must be a DataLoader, or an iterable of (inputs, targets) "
                "that has a length and can be gone through more than once."
            )
        self._total = total
        self._sampler = getattr(loader, "sampler", None)
        shares_itself = hasattr(self._sampler, "num_replicas")
        self.rank, self.world = (0, 1) if shares_itself else (rank, world)
        if self._total < (self.world if train else 1):
            raise TersenetError(f"{name} has {self._total} batches; at least one per process is needed.")

    def __len__(self) -> int:
        return self._total // self.world if self.train else len(range(self.rank, self._total, self.world))

    @property
    def n(self) -> int:
        """Samples per epoch; of a plain iterable, the number of batches times the size of the first."""
        n = self._total * len(first_tensor(self.first))
        if self._sampler is not None and hasattr(self._sampler, "__len__"):
            n = min(n, len(self._sampler))
        return n * getattr(self._sampler, "num_replicas", 1)

    @cached_property
    def first(self) -> tuple[Any, Any]:
        """The first batch, looked at without a trace in torch's global generator."""
        with torch.random.fork_rng(devices=[]):
            self._begin(0)
            for batch in self.loader:
                return self._pair(batch)
        raise TersenetError(f"{self.name} says that it has {self._total} batches, but gives none.")

    def batches(self, epoch: int) -> Iterator[tuple[Any, Any]]:
        """This rank's batches, as the loader gives them."""
        self._begin(epoch)
        end = len(self) * self.world if self.train else self._total
        for number, batch in enumerate(self.loader):
            if number >= end:
                return
            if number % self.world == self.rank:
                yield self._pair(batch)

    def _begin(self, epoch: int) -> None:
        batch_sampler = getattr(self.loader, "batch_sampler", None)
        inner = getattr(batch_sampler, "sampler", None)
        for part in (self.loader, self._sampler, batch_sampler, inner):
            if isinstance(part, (DataLoader, Sampler)) and hasattr(part, "generator"):
                cast(Any, part).generator = generator("loader", self.seed, epoch)
        for part in (self._sampler, batch_sampler, inner, getattr(self.loader, "dataset", None)):
            if hasattr(part, "set_epoch"):
                cast(Any, part).set_epoch(epoch)

    def _pair(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, (tuple, list)) and len(cast(list[Any], batch)) == 2:
            inputs, targets = cast(list[Any], batch)
            return inputs, targets
        raise TersenetError(f"{self.name} gives a {type(batch).__name__} as a batch; it must be (inputs, targets).")


def first_tensor(value: Any) -> Tensor:
    """The first tensor in nested tuples, lists and dicts."""
    while isinstance(value, (tuple, list, dict)) and value:
        value = next(iter(value.values() if isinstance(value, dict) else value))
    if not isinstance(value, Tensor):
        raise TersenetError(f"a batch holds a {type(value).__name__} where a tensor belongs.")
    return value
