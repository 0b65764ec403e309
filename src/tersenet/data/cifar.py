"""CIFAR-10 and CIFAR-100 as users have them: the binary or the python version, as a folder or still as .tar.gz.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009).
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tersenet.data.augment import CropFlip
from tersenet.data.cifar_layout import PIXELS, Layout, find
from tersenet.data.unpickle import read_dict
from tersenet.errors import TersenetError

AUGMENT = CropFlip(pad=4, flip=True)
CLASSES = {"cifar10": 10, "cifar100": 100}

_SHAPE = (3, 32, 32)
_Array = np.ndarray[Any, np.dtype[Any]]


def read(name: str, location: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels: (N, 3, 32, 32) uint8 RGB and (N,) int64.

    Args:
        name: cifar10 or cifar100 (whose fine labels are taken).
        location: the folder of either version, a folder that has it or its .tar.gz in it, or that .tar.gz.

    Raises:
        TersenetError: nothing found there; a file is missing, truncated or damaged, or has a label out of range; or a
            pickle asks for code. The file is named.
    """
    path = Path(location).expanduser()
    parts: dict[str, tuple[_Array, _Array]] = {}
    try:
        layout, contents = find(name, path)
        for file, where, data in contents:
            images, labels = (_unpickled if layout.pickled else _binary)(data, layout, file, where)
            _check_labels(labels, layout, where)
            parts[file] = images, labels[:, -1]
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise TersenetError(f"{path} can't be read: {error}. `tersenet data fetch {name} DIR` gets it anew.") from error
    missing = [file for file in layout.files if file not in parts]
    if missing:
        raise TersenetError(
            f"{path}: {layout.folder} lacks {', '.join(missing)}; `tersenet data fetch {name} DIR` gets it whole."
        )
    train, test = [parts[file] for file in layout.train], parts[layout.test]
    return *_tensors(train), *_tensors([test])


def _binary(data: bytes, layout: Layout, file: str, where: str) -> tuple[_Array, _Array]:
    record = len(layout.labels) + PIXELS
    expected = layout.records(file) * record
    if len(data) != expected:
        size = f"more than {expected:,}" if len(data) > expected else f"{len(data):,}"
        raise TersenetError(
            f"{where} has {size} bytes; {layout.records(file):,} records of {record} make {expected:,}. "
            "It is truncated, or no CIFAR file."
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, len(layout.labels) :], records[:, : len(layout.labels)]


def _unpickled(data: bytes, layout: Layout, file: str, where: str) -> tuple[_Array, _Array]:
    content = read_dict(data, where)
    images, n = content.get("data"), layout.records(file)
    if not isinstance(images, np.ndarray) or images.shape != (n, PIXELS):
        raise TersenetError(f"{where}: 'data' is {_kind(images)}; an array of shape ({n}, {PIXELS}) is expected.")
    columns: list[_Array] = []
    for key, _ in layout.labels:
        labels = content.get(key)
        if not isinstance(labels, list) or len(cast(list[Any], labels)) != n:
            raise TersenetError(f"{where}: {key!r} is {_kind(labels)}; a list of {n} labels is expected.")
        if not all(isinstance(label, int) for label in cast(list[Any], labels)):
            raise TersenetError(f"{where}: {key!r} holds other things than whole numbers.")
        columns.append(np.array(labels))
    return images, np.stack(columns, 1)


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"a list of {len(cast(list[Any], value))}" if isinstance(value, list) else f"a {type(value).__name__}"


def _check_labels(labels: _Array, layout: Layout, where: str) -> None:
    for column, (key, classes) in zip(labels.T, layout.labels, strict=True):
        wrong = np.flatnonzero((column < 0) | (column >= classes))
        if len(wrong):
            raise TersenetError(
                f"{where}: image {wrong[0]} has {column[wrong[0]]} in {key}, which go from 0 to {classes - 1}. "
                "It is damaged, or no CIFAR file."
            )


def _tensors(parts: list[tuple[_Array, _Array]]) -> tuple[Tensor, Tensor]:
    images = np.concatenate([images for images, _ in parts]).reshape(-1, *_SHAPE)
    return torch.from_numpy(images), torch.from_numpy(np.concatenate([labels for _, labels in parts]).astype(np.int64))
