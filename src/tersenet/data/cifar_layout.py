"""How CIFAR's published archives are laid out, and finding one: a folder of either version, or still the .tar.gz.

Source: https://www.cs.toronto.edu/~kriz/cifar.html describes both versions.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tersenet.errors import TersenetError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """One published archive. A binary record is `len(labels)` label bytes, then R, G and B planes of 32 rows."""

    folder: str
    archive: str
    pickled: bool
    train: tuple[str, ...]
    test: str
    train_records: int
    """in each training file"""
    test_records: int
    labels: tuple[tuple[str, int], ...]
    """(key in the pickled dict, classes) in the order of the binary record; the last is the one that is learned"""

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test)

    def records(self, file: str) -> int:
        return self.test_records if file == self.test else self.train_records

    def limit(self, file: str) -> int:
        """More bytes than the file can rightly have, so that a forged one can't fill the memory."""
        return self.records(file) * 2 * PIXELS


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEN = (("labels", 10),)
_HUNDRED = (("coarse_labels", 20), ("fine_labels", 100))
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "cifar10": (
        Layout(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            False,
            tuple(f"{name}.bin" for name in _BATCHES),
            "test_batch.bin",
            10_000,
            10_000,
            _TEN,
        ),
        Layout("cifar-10-batches-py", "cifar-10-python.tar.gz", True, _BATCHES, "test_batch", 10_000, 10_000, _TEN),
    ),
    "cifar100": (
        Layout(
            "cifar-100-binary", "cifar-100-binary.tar.gz", False, ("train.bin",), "test.bin", 50_000, 10_000, _HUNDRED
        ),
        Layout("cifar-100-python", "cifar-100-python.tar.gz", True, ("train",), "test", 50_000, 10_000, _HUNDRED),
    ),
}


def present(folder: Path, layout: Layout) -> bool:
    """Whether every file of the layout lies in the folder."""
    return all((folder / file).is_file() for file in layout.files)


def find(name: str, path: Path) -> tuple[Layout, Iterator[tuple[str, str, bytes]]]:
    """The layout that lies at `path`, and its files as (name, where it is, content)."""
    layouts = LAYOUTS[name]
    if path.is_file():
        inside = _top_folders(path)
        for layout in layouts:
            if layout.folder in inside:
                return layout, _archive(path, layout)
        raise TersenetError(f"{path} is no archive of {name}: {' or '.join(x.archive for x in layouts)} is expected.")
    folders = [(layout, folder) for layout in layouts for folder in (path, path / layout.folder)]
    for layout, folder in folders:
        if present(folder, layout):
            return layout, _folder(folder, layout)
    for layout in layouts:
        if (path / layout.archive).is_file():
            return layout, _archive(path / layout.archive, layout)
    for layout, folder in folders:
        if any((folder / file).is_file() for file in layout.files):
            return layout, _folder(folder, layout)
    looked = ", ".join([layout.folder for layout in layouts] + [layout.archive for layout in layouts])
    raise TersenetError(
        f"{path} {f'holds no {name}' if path.is_dir() else 'does not exist'}; a folder that is or has one of these is "
        f"expected: {looked}. `tersenet data fetch {name} {path}` downloads it."
    )


def _folder(folder: Path, layout: Layout) -> Iterator[tuple[str, str, bytes]]:
    for file in layout.files:
        if (folder / file).is_file():
            with (folder / file).open("rb") as stream:
                yield file, str(folder / file), stream.read(layout.limit(file))


def _top_folders(path: Path) -> set[str]:
    """Folders of the first members: enough to tell the version, and quick, as what is passed over is decompressed."""
    with tarfile.open(path) as tar:
        return {member.name.removeprefix("./").partition("/")[0] for member in itertools.islice(tar, 3)}


def _archive(path: Path, layout: Layout) -> Iterator[tuple[str, str, bytes]]:
    """In one pass, in memory: nothing is extracted, so no member can be written anywhere."""
    wanted = {f"{layout.folder}/{file}" for file in layout.files}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            stream = tar.extractfile(member) if name in wanted and member.isreg() else None
            if stream is not None:
                file = name.rpartition("/")[2]
                yield file, f"{path}: {name}", stream.read(layout.limit(file))
