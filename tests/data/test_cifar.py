from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_support import code_pickle, python2_pickle, shrink_cifar, write_cifar
from tersenet.data import cifar
from tersenet.data.bundle import TensorLoader
from tersenet.data.cifar_layout import LAYOUTS
from tersenet.data.load import load_data
from tersenet.errors import TersenetError


@pytest.fixture(autouse=True)
def _small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cifar10_folder" not in request.fixturenames:
        shrink_cifar(monkeypatch)


def pack(folder: Path, prefix: str = "") -> Path:
    """The .tar.gz of a layout's own folder, beside it."""
    archive = folder.parent / "some.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, prefix + folder.name)
    return archive


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("pickled", [False, True])
def test_every_version_reads_the_same(tmp_path: Path, name: str, pickled: bool) -> None:
    binary = cifar.read(name, write_cifar(tmp_path / "binary", name))
    own = write_cifar(tmp_path / "other", name, pickled=pickled)
    for location in (own, own.parent, pack(own), pack(own, "./")):
        for got, expected in zip(cifar.read(name, location), binary, strict=True):
            assert torch.equal(got, expected)
    files = len(LAYOUTS[name][0].train)
    assert binary[0].shape == (10 * files, 3, 32, 32)
    assert binary[0].dtype == torch.uint8
    assert binary[3].tolist() == list(range(10))


def test_planes_and_labels_are_where_the_format_says(tmp_path: Path) -> None:
    own = write_cifar(tmp_path, "cifar100")
    record = np.fromfile(own / "test.bin", np.uint8)[3074 * 3 :][:3074]
    _, _, images, labels = cifar.read("cifar100", own)
    assert labels[3] == record[1]
    assert torch.equal(images[3, 1, 0], torch.from_numpy(record[2 + 1024 : 2 + 1024 + 32]))


def test_a_folder_with_the_archive_in_it(tmp_path: Path) -> None:
    own = write_cifar(tmp_path / "files")
    expected = cifar.read("cifar10", own)
    (tmp_path / "download").mkdir()
    pack(own).rename(tmp_path / "download" / "cifar-10-binary.tar.gz")
    assert torch.equal(cifar.read("cifar10", tmp_path / "download")[0], expected[0])


def test_pickles_of_python_3(tmp_path: Path) -> None:
    own = write_cifar(tmp_path, pickled=True)
    expected = cifar.read("cifar10", own)
    for protocol in (2, 4):
        for file in LAYOUTS["cifar10"][1].files:
            content = pickle.loads((own / file).read_bytes(), encoding="bytes")
            content[b"data"] = np.asfortranarray(content[b"data"])
            (own / file).write_bytes(pickle.dumps(content, protocol=protocol))
        assert torch.equal(cifar.read("cifar10", own)[0], expected[0])


def test_a_complete_version_goes_before_a_broken_one(tmp_path: Path) -> None:
    (write_cifar(tmp_path) / "test_batch.bin").unlink()
    expected = cifar.read("cifar10", write_cifar(tmp_path, pickled=True, seed=1))
    assert torch.equal(cifar.read("cifar10", tmp_path)[0], expected[0])


@pytest.mark.parametrize("size", [0, 3073, 30_729, 30_731, 40_000])
def test_a_file_of_the_wrong_size(tmp_path: Path, size: int) -> None:
    own = write_cifar(tmp_path)
    os.truncate(own / "data_batch_3.bin", size)
    with pytest.raises(TersenetError, match=r"data_batch_3\.bin has .* bytes; 10 records of 3073 make 30,730"):
        cifar.read("cifar10", own)


@pytest.mark.parametrize(
    ("name", "place", "says"), [("cifar10", 0, "labels"), ("cifar100", 0, "coarse"), ("cifar100", 1, "fine")]
)
def test_a_label_out_of_range(tmp_path: Path, name: str, place: int, says: str) -> None:
    own = write_cifar(tmp_path, name)
    file = own / LAYOUTS[name][0].test
    content = bytearray(file.read_bytes())
    content[len(content) // 10 * 4 + place] = 200
    file.write_bytes(content)
    with pytest.raises(TersenetError, match=rf"{file.name}: image 4 has 200 in {says}"):
        cifar.read(name, own)


def test_a_missing_file(tmp_path: Path) -> None:
    own = write_cifar(tmp_path)
    (own / "data_batch_2.bin").unlink()
    with pytest.raises(TersenetError, match=r"lacks data_batch_2\.bin; `tersenet data fetch cifar10"):
        cifar.read("cifar10", own)


@pytest.mark.parametrize(("make", "says"), [(True, "holds no cifar10"), (False, "does not exist")])
def test_nothing_there(tmp_path: Path, make: bool, says: str) -> None:
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
    with pytest.raises(TersenetError, match=says) as caught:
        cifar.read("cifar10", folder)
    for word in ("cifar-10-batches-bin", "cifar-10-batches-py", f"tersenet data fetch cifar10 {folder}"):
        assert word in str(caught.value)


def test_an_archive_cut_short(tmp_path: Path) -> None:
    archive = pack(write_cifar(tmp_path))
    os.truncate(archive, archive.stat().st_size // 2)
    with pytest.raises(TersenetError, match=r"some\.tar\.gz can't be read"):
        cifar.read("cifar10", archive)


def test_an_archive_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(TersenetError, match="no archive of cifar10"):
        cifar.read("cifar10", pack(write_cifar(tmp_path, "cifar100")))
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(TersenetError, match=r"notes\.txt can't be read"):
        cifar.read("cifar10", tmp_path / "notes.txt")


def test_a_pickle_that_runs_code_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write_cifar(tmp_path, pickled=True)
    (own / "data_batch_4").write_bytes(code_pickle())
    with pytest.raises(TersenetError, match=r"data_batch_4 is no CIFAR batch: it asks for builtins\.print"):
        cifar.read("cifar10", own)
    assert "stranger" not in capsys.readouterr().out


PIXELS = np.zeros((10, 3072), np.uint8)
GOOD = python2_pickle(PIXELS, {"labels": [1] * 10})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD[:-5], "damaged"),
        (GOOD[: len(GOOD) // 2], "damaged"),
        (b"", "damaged"),
        (b"no pickle", "damaged"),
        (pickle.dumps([1, 2]), "holds a list, not a dict"),
        (pickle.dumps({5: 5}), "a int where a name belongs"),
        (b"\x80\x02}cnumpy\ndtype\n)RK\x01s.", "damaged"),
        (b"\x80\x02cnumpy\ndtype\n}b.", "damaged"),
        (pickle.dumps({"data": 5, "labels": [1] * 10}), "'data' is a int"),
        (pickle.dumps({"data": PIXELS[:5], "labels": [1] * 10}), r"'data' is an array of shape \(5, 3072\)"),
        (pickle.dumps({"data": PIXELS.astype(np.int8), "labels": [1] * 10}), "its array can't be read"),
        (pickle.dumps({"data": PIXELS, "labels": [1] * 9}), "'labels' is a list of 9; a list of 10"),
        (pickle.dumps({"data": PIXELS}), "'labels' is a NoneType"),
        (pickle.dumps({"data": PIXELS, "labels": ["cat"] * 10}), "other things than whole numbers"),
        (python2_pickle(PIXELS, {"labels": [1] * 9 + [-1]}), "image 9 has -1 in labels"),
        (python2_pickle(PIXELS, {"labels": [1] * 9 + [10]}), "image 9 has 10 in labels, which go from 0 to 9"),
        # A shape of 2^31 images with ten images' bytes; a memo number that makes the C unpickler allocate 64 GB.
        (GOOD.replace(b"J\x0a\x00\x00\x00J\x00\x0c", b"J\xff\xff\xff\x7fJ\x00\x0c"), "its array can't be read"),
        (b"\x80\x02}r\xfe\xff\xff\xff.", "'data' is a NoneType"),
    ],
)
def test_damaged_and_forged_pickles(tmp_path: Path, content: bytes, says: str) -> None:
    own = write_cifar(tmp_path, pickled=True)
    (own / "test_batch").write_bytes(content)
    with pytest.raises(TersenetError, match=says) as caught:
        cifar.read("cifar10", own)
    assert "test_batch" in str(caught.value)


def test_members_of_an_archive_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = write_cifar(tmp_path / "files")
    archive = tmp_path / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(own, own.name)
        info = tarfile.TarInfo("../../escaped.bin")
        tar.addfile(info)
        link = tarfile.TarInfo(f"{own.name}/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    cifar.read("cifar10", archive)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.data
def test_the_real_set(cifar10_folder: Path) -> None:
    data = load_data(f"cifar10:{cifar10_folder}")
    train, validation, test = data.train, data.validation, data.test
    assert isinstance(train, TensorLoader)
    assert isinstance(validation, TensorLoader)
    assert isinstance(test, TensorLoader)
    assert (train.n, validation.n, test.n) == (45_000, 5_000, 10_000)
    assert train.labels[validation.order.indices].bincount().tolist() == [500] * 10
    assert test.labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]
    # Published for the 50,000 training images; a few of this copy are approximations.
    means = train.images.numpy().mean((0, 2, 3), dtype=np.float64)
    assert np.allclose(means, [125.3069, 122.9504, 113.8654], rtol=0, atol=2e-4)
    assert sum(len(labels) for _, labels in train.batches(0)) == 45_000
    pixels = torch.cat([images for images, _ in validation.batches(0)])
    assert pixels.mean().abs() < 0.02
    assert abs(pixels.std() - 1) < 0.02
