"""Image files in class folders, with the standard ImageNet transforms."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tersenet.data.augment import to_float
from tersenet.data.order import Order, derived_seed
from tersenet.data.registry import MeanStd, normalisation
from tersenet.data.transforms import SIZE, random_resized_crop, resize_and_centre
from tersenet.errors import TersenetError, UnknownNameError

SHAPE = (3, SIZE, SIZE)
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
CLASSES_FILE = "classes.txt"


@dataclass(frozen=True)
class Files:
    """One split: paths and their class numbers (N,), in the order of the folders' and files' names."""

    paths: list[str]
    labels: Tensor


def read(location: str | Path) -> tuple[Files | None, Files | None, int]:
    """The files of DIR/train and of DIR/val (None where there is none), and the number of classes.

    A class's number is its folder's place among the sorted folders of DIR/train (DIR/val without it), or what
    DIR/classes.txt says: lines of number, folder, name. That is needed where only some classes have a folder.

    Raises:
        TersenetError: the layout is another, a class is unknown, or a split has no images.
    """
    root = Path(location).expanduser()
    splits = {name: root / name for name in ("train", "val") if (root / name).is_dir()}
    if not splits:
        raise TersenetError(f"{root} has neither train/CLASS/* nor val/CLASS/*; image folders are laid out like that.")
    numbers = _class_numbers(root, next(iter(splits.values())))
    files = {name: _scan(folder, numbers) for name, folder in splits.items()}
    return files.get("train"), files.get("val"), max(numbers.values()) + 1


def _class_numbers(root: Path, split: Path) -> dict[str, int]:
    listed = root / CLASSES_FILE
    if not listed.is_file():
        numbers = {name: number for number, name in enumerate(_folders(split))}
        if not numbers:
            raise TersenetError(f"{split} has no class folders; images belong into {split}/CLASS/.")
        return numbers
    numbers: dict[str, int] = {}
    for line_number, line in enumerate(listed.read_text("utf-8", errors="replace").splitlines(), 1):
        fields = line.split()
        if fields and (len(fields) < 2 or not fields[0].isdecimal() or fields[1] in numbers):
            raise TersenetError(f"{listed}:{line_number}: {line!r}; a line is: number folder name; each folder once.")
        if fields:
            numbers[fields[1]] = int(fields[0])
    if sorted(numbers.values()) != list(range(len(numbers))) or not numbers:
        raise TersenetError(f"{listed}: the class numbers must be 0 to {len(numbers) - 1}, each once.")
    return numbers


def _folders(split: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith("."))


def _scan(split: Path, numbers: dict[str, int]) -> Files:
    paths: list[str] = []
    labels: list[int] = []
    for name in _folders(split):
        if name not in numbers:
            raise UnknownNameError(
                "class folder", name, numbers, f"{split} may have those of train, or of {CLASSES_FILE}."
            )
        for folder, inner, files in os.walk(split / name, followlinks=True):
            inner.sort()
            # Hidden files: macOS puts ._image.jpg, which is no image, beside each image it archives.
            found = [f for f in sorted(files) if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
            paths += [os.path.join(folder, file) for file in found]
            labels += [numbers[name]] * len(found)
    if not paths:
        raise TersenetError(f"{split} has no images ({' '.join(EXTENSIONS)}) in its class folders.")
    return Files(paths, torch.tensor(labels))


class FolderLoader:
    """Batches of image files: float32 (batch, 3, 224, 224), and int64 (batch,).

    What an image's augmentation draws depends on (seed, epoch, image) only: not on the batch, the rank or the worker.

    Args:
        batch_size: images per batch of this rank.
        shuffle: a training set: shuffled in each epoch, the same number of batches on every rank.
        augment: RandomResizedCrop and mirroring; otherwise resize to 256 and the centre.
        workers: processes that read and transform; 0: the caller's own.
        indices: only these files, in this order.
    """

    def __init__(
        self,
        files: Files,
        *,
        batch_size: int,
        shuffle: bool = False,
        augment: bool = False,
        normalise: str | MeanStd = "imagenet",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        indices: Tensor | None = None,
    ) -> None:
        chosen = torch.arange(len(files.paths)) if indices is None else indices
        self.files = files
        self.order = Order(chosen, batch_size, shuffle, seed, rank, world)
        self.augment = augment
        self.normalise = normalisation(normalise, 3)
        self.workers = workers

    @property
    def n(self) -> int:
        return len(self.order.indices)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Raises TersenetError at the batch that has an unreadable image; the message names the file."""
        batches = self.order.epoch(epoch)
        dataset = _Images(self.files.paths, (self.order.seed, epoch) if self.augment else None)
        # Its own generator: without one, a DataLoader draws from torch's global one.
        loader = DataLoader(
            dataset,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.workers,
            collate_fn=_collate,
            generator=torch.Generator(),
        )
        for index, images in zip(batches, loader, strict=True):
            if isinstance(images, str):
                raise TersenetError(images)
            yield to_float(images, self.normalise), self.files.labels[index]


class _Images(Dataset[Any]):
    """Transformed images as (3, 224, 224) bytes. `draw`: (seed, epoch) of the augmentation, None for evaluation."""

    def __init__(self, paths: Sequence[str], draw: tuple[int, int] | None) -> None:
        self.paths = paths
        self.draw = draw

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | str:
        # An error is returned, not raised: on its way out of a worker it would be wrapped in a traceback.
        try:
            with Image.open(self.paths[index]) as file:
                image = file.convert("RGB")
            if self.draw is None:
                image = resize_and_centre(image)
            else:
                image = random_resized_crop(image, random.Random(derived_seed("augment", *self.draw, index)))
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
        except Exception as error:
            return f"can't read the image {self.paths[index]}: {error}. Replace it, or take it out of the folder."


def _collate(images: list[Tensor | str]) -> Tensor | str:
    tensors = [image for image in images if isinstance(image, Tensor)]
    return torch.stack(tensors) if len(tensors) == len(images) else next(i for i in images if isinstance(i, str))
