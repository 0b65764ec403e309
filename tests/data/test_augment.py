from __future__ import annotations

import torch

from tersenet.data.augment import CropFlip, to_float
from tersenet.data.order import generator
from tersenet.data.registry import NORMALISATION


def images(n: int = 5, channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randint(1, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator("images"))


def test_every_image_gets_its_own_window() -> None:
    """Against the plain definition, image by image: mirror, pad with black, cut out."""
    batch = images(64)
    augment = CropFlip(pad=4, flip=True)
    draws = augment.draw(64, generator(1))
    got = augment(batch, draws)
    for image, (row, column, mirrored), result in zip(batch, draws.tolist(), got, strict=True):
        image = image.flip(2) if mirrored else image
        padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
        assert torch.equal(result, padded[:, row : row + 8, column : column + 8])


def test_the_middle_window_is_the_image() -> None:
    batch = images()
    assert torch.equal(CropFlip(4, True)(batch, torch.tensor([[4, 4, 0]] * 5)), batch)
    assert torch.equal(CropFlip(4, True)(batch, torch.tensor([[4, 4, 1]] * 5)), batch.flip(3))


def test_draws_reach_every_offset_equally() -> None:
    draws = CropFlip(pad=4, flip=True).draw(90_000, generator(0))
    for column in (0, 1):
        counts = draws[:, column].bincount()
        assert len(counts) == 9
        assert (counts - 10_000).abs().max() < 500
    assert abs(draws[:, 2].float().mean() - 0.5) < 0.01
    assert CropFlip(pad=1, flip=False).draw(100, generator(0))[:, 2].sum() == 0


def test_the_border_is_black_before_normalisation() -> None:
    batch = CropFlip(4, False)(images(1), torch.tensor([[0, 0, 0]]))
    mean, std = (torch.tensor(v) for v in NORMALISATION["imagenet"])
    assert torch.equal(to_float(batch, NORMALISATION["imagenet"])[0, :, 0, 0], (0 - mean) / std)


def test_to_float_is_torchvisions_formula_to_the_bit() -> None:
    batch = images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in NORMALISATION["cifar10"])
    expected = torch.stack([(image.to(torch.float32).div(255) - mean) / std for image in batch])
    assert torch.equal(to_float(batch, NORMALISATION["cifar10"]), expected)
    assert batch.dtype == torch.uint8
