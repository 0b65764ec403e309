"""Fixtures that several parts share. This folder is on the path: `import data_support` works in every test."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_support import cifar10_records, image_archive


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data and weights that TERSENET_TEST_DATA names; skips where there is none."""
    folder = os.environ.get("TERSENET_TEST_DATA")
    if not folder:
        pytest.skip("TERSENET_TEST_DATA names no folder of real data and weights")
    return Path(folder)


@pytest.fixture(scope="session")
def cifar10_folder(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has the real CIFAR-10 in its official binary layout (180 MB, written once per session)."""
    folder = tmp_path_factory.mktemp("cifar10")
    batches = folder / "cifar-10-batches-bin"
    batches.mkdir()
    parts = [image_archive(test_data / "cifar10" / f"cifar10_train_{part}.npz") for part in "ab"]
    train = np.concatenate([cifar10_records(images, labels) for images, labels in parts])
    for number in range(5):
        train[number * 10_000 : (number + 1) * 10_000].tofile(batches / f"data_batch_{number + 1}.bin")
    cifar10_records(*image_archive(test_data / "cifar10" / "cifar10_test.npz")).tofile(batches / "test_batch.bin")
    return folder
