"""From a data specification, settings, or a user's own loaders to `Data`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from tersenet.data import cifar, digits, imagefolder, user
from tersenet.data.bundle import Data, TensorLoader
from tersenet.data.imagefolder import FolderLoader
from tersenet.data.order import stratified_split
from tersenet.data.registry import DEFAULT_NORMALISATION, NAMES, DataSettings, MeanStd, normalisation, parse
from tersenet.errors import TersenetError


def load_data(
    settings: Any, *, seed: int = 0, rank: int = 0, world: int = 1, normalise: str | MeanStd | None = None
) -> Data:
    """The data that is meant, ready to be looped over.

    Args:
        settings: DataSettings; a specification such as "digits" or "cifar10:DIR"; or what a user has: Data, a pair
            (train_loader, test_loader), a dict of loaders with a loss or metric, or one loader (a test set).
        seed: for the split into training and validation, the shuffling and the augmentation. The test set never
            depends on it.
        rank, world: this process among how many; the training batch is divided among them.
        normalise: what the weights in use call for; `settings.normalise` goes before it, the data set's own follows.

    Raises:
        UnknownNameError: no such data set, function or normalisation; the message has the nearest names.
        TersenetError: the files or the loaders are not what they should be.
    """
    if isinstance(settings, str):
        parse(settings)
        settings = DataSettings(source=settings)
    if not isinstance(settings, DataSettings):
        return user.bundle(settings, "data", seed=seed, rank=rank, world=world)
    name, location = parse(settings.source)
    if name not in NAMES:
        return user.bundle(user.call(name), name, seed=seed, rank=rank, world=world)
    chosen = settings.normalise or normalise or DEFAULT_NORMALISATION[name]
    build = _files if name == "imagefolder" else _tensors
    return build(settings, name, location or "", chosen, _Share(seed, rank, world))


@dataclass(frozen=True)
class _Share:
    seed: int
    rank: int
    world: int


def _tensors(settings: DataSettings, name: str, location: str, normalise: str | MeanStd, share: _Share) -> Data:
    if name == "digits":
        contents, classes, augment = digits.read(), digits.CLASSES, digits.AUGMENT
    else:
        contents, classes, augment = cifar.read(name, location), cifar.CLASSES[name], cifar.AUGMENT
    train_images, train_labels, test_images, test_labels = contents
    train, validation = _split(train_labels, settings, share.seed)

    def loader(images: Tensor, labels: Tensor, indices: Tensor | None = None, training: bool = False) -> TensorLoader:
        return TensorLoader(
            images,
            labels,
            batch_size=_batch_size(settings, share.world, training),
            shuffle=training,
            augment=augment if training and settings.augment == "standard" else None,
            normalise=normalise,
            indices=indices,
            **asdict(share),
        )

    return Data(
        name=settings.source,
        train=loader(train_images, train_labels, train, training=True),
        validation=None if validation is None else loader(train_images, train_labels, validation),
        test=loader(test_images, test_labels),
        classes=classes,
        shape=(train_images.shape[1], train_images.shape[2], train_images.shape[3]),
        normalise=normalisation(normalise, train_images.shape[1]),
    )


def _files(settings: DataSettings, name: str, location: str, normalise: str | MeanStd, share: _Share) -> Data:
    training_files, test_files, classes = imagefolder.read(location)

    def loader(files: imagefolder.Files, indices: Tensor | None = None, training: bool = False) -> FolderLoader:
        return FolderLoader(
            files,
            batch_size=_batch_size(settings, share.world, training),
            shuffle=training,
            augment=training and settings.augment == "standard",
            normalise=normalise,
            workers=settings.workers,
            indices=indices,
            **asdict(share),
        )

    train = validation = None
    if training_files is not None:
        indices, held_out = _split(training_files.labels, settings, share.seed)
        train = loader(training_files, indices, training=True)
        validation = None if held_out is None else loader(training_files, held_out)
    return Data(
        name=settings.source,
        train=train,
        validation=validation,
        test=None if test_files is None else loader(test_files),
        classes=classes,
        shape=imagefolder.SHAPE,
        normalise=normalisation(normalise, imagefolder.SHAPE[0]),
    )


def _split(labels: Tensor, settings: DataSettings, seed: int) -> tuple[Tensor, Tensor | None]:
    """Sample numbers to train on, shuffled and limited, and those kept apart (None: nothing)."""
    train, validation = stratified_split(labels, settings.validation, seed)
    return train[: settings.train_limit], validation if len(validation) else None


def _batch_size(settings: DataSettings, world: int, training: bool) -> int:
    if not training:
        return settings.eval_batch_size
    if settings.batch_size < world:
        raise TersenetError(
            f"batch_size (={settings.batch_size}) is for all {world} processes together, and must be at least that."
        )
    return settings.batch_size // world
