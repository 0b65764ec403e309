from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_support import image_archive
from tersenet.data import imagefolder
from tersenet.data.bundle import Loader
from tersenet.data.imagefolder import FolderLoader
from tersenet.data.load import DataSettings, load_data
from tersenet.data.registry import NORMALISATION
from tersenet.data.transforms import random_resized_crop, resize_and_centre
from tersenet.errors import TersenetError


def photo(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train: 6 images in each of ape, bee, cat; val: 2 in each."""
    for split, count in (("train", 6), ("val", 2)):
        for number, name in enumerate(("ape", "bee", "cat")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                photo(100 * number + i).save(tmp_path / split / name / f"{i}.{('jpg', 'PNG')[i % 2]}")
    return tmp_path


def loaders(folder: Path, **changes: object) -> tuple[Loader, Loader, Loader]:
    settings = {"source": f"imagefolder:{folder}", "batch_size": 4, "eval_batch_size": 4, "validation": 3}
    data = load_data(DataSettings.model_validate(settings | changes))
    assert data.train is not None
    assert data.validation is not None
    assert data.test is not None
    return data.train, data.validation, data.test


def all_of(loader: Loader, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*loader.batches(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_splits_shapes_and_labels(folder: Path) -> None:
    data = load_data(f"imagefolder:{folder}")
    assert (data.classes, data.shape, data.normalise) == (3, (3, 224, 224), NORMALISATION["imagenet"])
    train, validation, test = loaders(folder)
    assert (train.n, validation.n, test.n) == (15, 3, 6)
    images, labels = all_of(test)
    assert images.shape == (6, 3, 224, 224)
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert sorted(all_of(validation)[1].tolist()) == [0, 1, 2]


def test_augmentation_depends_on_seed_epoch_and_image_only(folder: Path) -> None:
    train = loaders(folder)[0]
    images, labels = all_of(train, 2)
    list(train.batches(0))
    again, _ = all_of(loaders(folder, workers=2)[0], 2)
    assert torch.equal(images, again)
    other, other_labels = all_of(loaders(folder, batch_size=5)[0], 2)
    assert torch.equal(images, other)
    assert torch.equal(labels, other_labels)
    assert not torch.equal(images, all_of(train, 3)[0])


def test_ranks_share_the_epoch(folder: Path) -> None:
    files = imagefolder.read(folder)[0]
    assert files is not None
    whole, _ = all_of(FolderLoader(files, batch_size=4, shuffle=True, augment=True), 1)
    parts = [all_of(FolderLoader(files, batch_size=2, shuffle=True, augment=True, rank=r, world=2), 1) for r in (0, 1)]
    # 18 images: each rank leaves out its last batch, of one.
    assert torch.equal(torch.stack([parts[0][0], parts[1][0]], 1).flatten(0, 1), whole[:16])


def test_the_global_generator_is_left_alone(folder: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    all_of(loaders(folder)[0])
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [((500, 375), (341, 256), (58, 16)), ((375, 500), (256, 341), (16, 58)), ((60, 60), (256, 256), (16, 16))],
)
def test_evaluation_is_resize_and_centre(
    size: tuple[int, int], resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = photo(1, *size)
    expected = np.asarray(image.resize(resized, Image.Resampling.BILINEAR))
    left, top = corner
    assert np.array_equal(np.asarray(resize_and_centre(image)), expected[top : top + 224, left : left + 224])


def test_random_crops_cover_the_stated_areas() -> None:
    """A horizontal and a vertical ramp: the first and last values tell which part was cut out."""
    ramp = np.zeros((600, 800, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 800)[None]
    ramp[..., 1] = np.linspace(0, 255, 600)[:, None]
    draw = random.Random(0)
    areas: list[float] = []
    mirrored = 0
    for _ in range(200):
        pixels = np.asarray(random_resized_crop(Image.fromarray(ramp), draw)).astype(float) / 255
        width = float(pixels[0, -1, 0] - pixels[0, 0, 0])
        mirrored += width < 0
        width, height = abs(width), float(pixels[-1, 0, 1] - pixels[0, 0, 1])
        areas.append(width * height)
        assert 0.7 < width * 800 / (height * 600) < 1.45
    assert 0.06 < min(areas) < 0.15
    assert max(areas) > 0.8
    assert 70 < mirrored < 130


@pytest.mark.parametrize("size", [(2000, 10), (10, 2000)])
def test_a_strip_falls_back_to_its_centre(size: tuple[int, int]) -> None:
    strip = np.zeros((size[1], size[0], 3), np.uint8)
    middle = slice(990, 1010)
    strip[middle if size[1] == 2000 else slice(None), middle if size[0] == 2000 else slice(None)] = 255
    assert np.asarray(random_resized_crop(Image.fromarray(strip), random.Random(0))).min() == 255


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(folder: Path, mode: str) -> None:
    for path in (folder / "val" / "ape").iterdir():
        path.unlink()
    image = photo(1).convert("L").convert("I").convert("I;16") if mode == "I;16" else photo(1).convert(mode)
    image.save(folder / "val" / "ape" / "odd.tif")
    assert all_of(loaders(folder)[2])[0].shape == (5, 3, 224, 224)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_corrupt_image_is_named(folder: Path, damage: str, workers: int) -> None:
    path = folder / "val" / "bee" / "0.jpg"
    photo(3, 400, 300).save(path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "text": b"no image", "empty": b""}[damage])
    with pytest.raises(TersenetError) as caught:
        all_of(loaders(folder, workers=workers)[2])
    message = str(caught.value)
    assert message.startswith(f"can't read the image {path}: ")
    assert "Traceback" not in message
    assert "\n" not in message


def test_other_files_are_ignored(folder: Path) -> None:
    (folder / "val" / "ape" / "readme.txt").write_text("not an image")
    (folder / "val" / "ape" / "._0.jpg").write_bytes(b"what macOS leaves")
    (folder / "val" / ".cache").mkdir()
    (folder / "val" / "bee" / "images").mkdir()
    (folder / "val" / "bee" / "0.jpg").rename(folder / "val" / "bee" / "images" / "0.jpg")
    assert loaders(folder)[2].n == 6


def test_evaluation_needs_val_only(folder: Path) -> None:
    (folder / "train").rename(folder / "elsewhere")
    data = load_data(f"imagefolder:{folder}")
    assert data.train is None
    assert data.validation is None
    assert data.test is not None
    assert data.test.n == 6


def test_classes_txt_gives_the_numbers(folder: Path) -> None:
    (folder / "classes.txt").write_text("0\tbee\thoney bee\n1\tdog\tdog\n2 ape great ape\n3\tcat\tcat\n\n")
    data = load_data(f"imagefolder:{folder}")
    assert data.classes == 4
    assert data.test is not None
    assert all_of(data.test)[1].tolist() == [2, 2, 0, 0, 3, 3]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0 ape\n1 bee\n", "unknown class folder 'cat'"),
        ("0 ape\n1 bee\n3 cat\n", "the class numbers must be 0 to 2"),
        ("0 ape\n1\n2 cat\n", r"classes.txt:2: '1'"),
        ("0 ape\n1 ape\n", r"classes.txt:2: '1 ape'"),
        ("ape 0\n", r"classes.txt:1"),
        ("", "the class numbers must be"),
    ],
)
def test_a_wrong_classes_txt(folder: Path, text: str, says: str) -> None:
    (folder / "classes.txt").write_text(text)
    with pytest.raises(TersenetError, match=says):
        imagefolder.read(folder)


@pytest.mark.data
def test_real_images_with_their_published_class_numbers(test_data: Path, tmp_path: Path) -> None:
    sample = test_data / "imagenet_sample"
    images, labels = image_archive(sample / "imagenet_sample_500.npz")
    names = [line.split()[1] for line in (sample / "classes.txt").read_text().splitlines()]
    (tmp_path / "classes.txt").write_text((sample / "classes.txt").read_text())
    for image, label in zip(images[:60:3], labels[:60:3], strict=True):
        folder = tmp_path / "val" / names[label]
        folder.mkdir(parents=True)
        Image.fromarray(image).save(folder / "one.png")
    data = load_data(DataSettings(source=f"imagefolder:{tmp_path}", normalise="none"))
    assert data.classes == 1000
    assert data.test is not None
    pixels, numbers = all_of(data.test)
    assert numbers.tolist() == labels[:60:3].tolist()
    # They are 256x256: the resize changes nothing.
    assert torch.equal(pixels, torch.from_numpy(images[:60:3, 16:240, 16:240]).permute(0, 3, 1, 2) / 255)


def test_wrong_layouts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TersenetError, match=r"neither train/CLASS/\* nor val/CLASS/\*"):
        imagefolder.read(folder / "train")
    (folder / "val" / "cow").mkdir()
    with pytest.raises(TersenetError, match="unknown class folder 'cow'"):
        imagefolder.read(folder)
    (tmp_path / "bare" / "val").mkdir(parents=True)
    with pytest.raises(TersenetError, match="has no class folders"):
        imagefolder.read(tmp_path / "bare")
    (tmp_path / "bare" / "val" / "ape").mkdir()
    with pytest.raises(TersenetError, match="has no images"):
        imagefolder.read(tmp_path / "bare")
