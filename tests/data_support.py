"""Image sets for tests: real ones from TERSENET_TEST_DATA, and tiny made-up CIFARs in the official layouts."""

from __future__ import annotations

import dataclasses
import io
import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tersenet.data import cifar_layout


def image_archive(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, H, W, 3) images and labels of an .npz that holds encoded files of `per_file` stacked images each."""
    with np.load(path, allow_pickle=False) as content:
        blob, offsets, labels = content["blob"], content["offsets"], content["labels"]
        per_file = int(content["per_file"])
    strips = [
        np.asarray(Image.open(io.BytesIO(blob[begin:end].tobytes())).convert("RGB"))
        for begin, end in itertools.pairwise(offsets)
    ]
    width = strips[0].shape[1]
    height = strips[0].shape[0] // per_file
    return np.concatenate([strip.reshape(-1, height, width, 3) for strip in strips]), labels


def cifar10_records(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The official binary records (N, 3073): label, then planes of red, green and blue."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels.astype(np.uint8)[:, None], planes], 1)


def shrink_cifar(monkeypatch: pytest.MonkeyPatch, records: int = 10) -> None:
    """For one test, CIFAR's files have only so many images each: the official ones have 10,000 and 50,000."""
    for name, layouts in cifar_layout.LAYOUTS.items():
        small = tuple(dataclasses.replace(x, train_records=records, test_records=records) for x in layouts)
        monkeypatch.setitem(cifar_layout.LAYOUTS, name, small)


def write_cifar(folder: Path, name: str = "cifar10", *, pickled: bool = False, seed: int = 0) -> Path:
    """Write random images in a layout's own folder in `folder`, as many as the layout says; returns the own folder."""
    layout = next(x for x in cifar_layout.LAYOUTS[name] if x.pickled == pickled)
    target = folder / layout.folder
    target.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for file in layout.files:
        n = layout.records(file)
        pixels = random.integers(0, 256, (n, 3072), np.uint8)
        labels = np.stack([np.arange(n) % classes for _, classes in layout.labels], 1).astype(np.uint8)
        if pickled:
            columns = {key: labels[:, i].tolist() for i, (key, _) in enumerate(layout.labels)}
            (target / file).write_bytes(python2_pickle(pixels, columns))
        else:
            (target / file).write_bytes(np.concatenate([labels, pixels], 1).tobytes())
    return target


def python2_pickle(pixels: np.ndarray, columns: dict[str, list[int]]) -> bytes:
    """The bytes that Python 2's cPickle wrote for a CIFAR batch: protocol 2, byte strings, numpy's old module names."""

    def string(text: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(text)) + text

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    out = b"\x80\x02}(" + string(b"batch_label") + string(b"training batch 1 of 5")
    for key, labels in columns.items():
        out += string(key.encode()) + b"](" + b"".join(map(integer, labels)) + b"e"
    shape = b"(" + b"".join(map(integer, pixels.shape)) + b"t"
    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + integer(0) + integer(1) + b"tR"
    dtype += b"(" + integer(3) + string(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t" + string(b"b") + b"tR"
    array += b"(" + integer(1) + shape + dtype + b"\x89" + string(pixels.tobytes()) + b"tb"
    return out + string(b"data") + array + b"u."


def code_pickle(command: Any = print) -> bytes:
    """A pickle that calls something when it is loaded carelessly."""
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return command, ("code of a stranger ran",)

    return pickle.dumps(Bomb())
