from __future__ import annotations

import hashlib

import torch
from sklearn.datasets import load_digits

from tersenet.data import digits
from tersenet.data.load import load_data


def test_all_images_once_with_their_labels() -> None:
    train_images, train_labels, test_images, test_labels = digits.read()
    assert train_images.shape == (1438, 1, 8, 8)
    assert test_images.shape == (359, 1, 8, 8)
    pixels, classes = load_digits(return_X_y=True)
    ours = torch.cat([train_images, test_images]).view(-1, 64).float() * (16 / 255)
    labels = torch.cat([train_labels, test_labels]).tolist()
    original = [(*row, label) for row, label in zip(pixels.astype(int).tolist(), classes.tolist(), strict=True)]
    found = [(*row, label) for row, label in zip(ours.round().int().tolist(), labels, strict=True)]
    assert sorted(map(str, found)) == sorted(map(str, original))


def test_the_test_set_is_stratified_and_never_changes() -> None:
    _, _, test_images, test_labels = digits.read()
    assert test_labels.bincount().tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert hashlib.sha256(test_images.numpy().tobytes()).hexdigest()[:16] == "85b1d38100b8bd75"
    first, second = (next(iter(load_data("digits", seed=seed).test.batches(0))) for seed in (0, 1))  # pyright: ignore
    assert torch.equal(first[0], second[0])
