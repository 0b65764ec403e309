"""Who sees which samples when: seeded orders, splits and shares, the same whatever ran before."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersenet.errors import TersenetError


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part; neighbouring parts give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh CPU generator seeded with the parts."""
    return torch.Generator().manual_seed(derived_seed(*parts))


@dataclass(frozen=True)
class Order:
    """The batches of one rank.

    Training (`shuffle`) permutes the samples anew in each epoch, and gives every rank the same number of them: up to
    world - 1 samples of an epoch are left out, other ones each time. So is a last batch of one sample, on which batch
    norm can't train. Evaluation keeps the order, and the ranks' shares are together exactly the whole set.
    """

    indices: Tensor
    batch_size: int
    shuffle: bool
    seed: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise TersenetError(f"batch_size (={self.batch_size}) must be at least 1.")
        if self.shuffle and len(self.indices) < self.world:
            raise TersenetError(f"{len(self.indices)} training samples can't be shared among {self.world} processes.")

    @property
    def _share(self) -> int:
        n = len(self.indices)
        return n // self.world if self.shuffle else len(range(self.rank, n, self.world))

    def __len__(self) -> int:
        whole, rest = divmod(self._share, self.batch_size)
        return whole + (rest > 1 or (rest == 1 and not (self.shuffle and whole)))

    def epoch(self, epoch: int) -> list[Tensor]:
        """Sample numbers by batch. The ranks' k-th ones are together the k-th, `world` times as large, of one rank."""
        indices = self.indices
        if self.shuffle:
            indices = indices[torch.randperm(len(indices), generator=generator("order", self.seed, epoch))]
        share = indices[self.rank :: self.world][: self._share]
        return list(share.split(self.batch_size))[: len(self)]


def stratified_split(labels: Tensor, part: float, seed: int, what: str = "validation") -> tuple[Tensor, Tensor]:
    """Split samples in two by a seeded permutation, every class in proportion.

    Args:
        labels: (N,) class numbers.
        part: size of the second side: a share below 1, or a whole number of samples; 0 = nothing.

    Returns:
        The sample numbers of both sides; the first in shuffled order, the second sorted.

    Raises:
        TersenetError: nothing would be left on the first side.
    """
    n = len(labels)
    count = (max(1, round(part * n)) if part < 1 else int(part)) if part else 0
    if count >= n:
        raise TersenetError(f"{what} (={part:g}) would take {count} of {n} training images; leave some to train on.")
    # numpy's legacy generator: its stream is frozen for good, so a split survives any upgrade.
    order = np.random.RandomState(derived_seed("split", seed) % 2**32).permutation(n)
    by_class = order[np.argsort(labels.numpy()[order], kind="stable")]
    _, starts, counts = np.unique(labels.numpy()[by_class], return_index=True, return_counts=True)
    # Place of each sample within its class, 0..1: the `count` smallest places take the same share of every class.
    place = (np.arange(n) - np.repeat(starts, counts) + 0.5) / np.repeat(counts, counts)
    chosen = np.sort(by_class[np.argsort(place, kind="stable")[:count]])
    rest = order[~np.isin(order, chosen)]
    return torch.from_numpy(rest), torch.from_numpy(chosen)
