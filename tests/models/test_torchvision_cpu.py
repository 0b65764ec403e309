"""torchvision beside a torch that its compiled operators may not load with."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tersenet.models.torchvision_cpu import nms, ready, roi_align
from zoo_support import needs


def overlap(a: Tensor, b: Tensor) -> float:
    width = max(0.0, float(min(a[2], b[2]) - max(a[0], b[0])))
    height = max(0.0, float(min(a[3], b[3]) - max(a[1], b[1])))
    areas = [float((x[2] - x[0]) * (x[3] - x[1])) for x in (a, b)]
    return width * height / (sum(areas) - width * height)


def brute_force(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """Of all that is left, the best one stays and takes out what overlaps it."""
    left = list(range(len(boxes)))
    kept: list[int] = []
    while left:
        best = max(left, key=lambda i: (float(scores[i]), -i))
        kept.append(best)
        left = [i for i in left if i != best and overlap(boxes[best], boxes[i]) <= threshold]
    return kept


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_nms_is_greedy(seed: int, threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(40, 2, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
    # Few different scores: equal ones keep the order in which they came.
    scores = torch.randint(0, 8, (40,), generator=generator).double()
    assert nms(boxes, scores, threshold).tolist() == brute_force(boxes, scores, threshold)


def test_nms_of_nothing_and_of_twins() -> None:
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).shape == (0,)
    twins = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]])
    assert nms(twins, torch.tensor([0.1, 0.9, 0.5]), 0.5).tolist() == [1, 2]


def at(image: Tensor, y: float, x: float) -> float:
    """The bilinear value at a point; zero more than one pixel outside."""
    height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = min(int(y), max(height - 2, 0)), min(int(x), max(width - 2, 0))
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
    lower = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
    return float(upper * (1 - y + top) + lower * (y - top))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (1, 4)])
def test_roi_align_point_by_point(aligned: bool, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    # Boxes of every kind: inside, over the border, far outside, smaller than a pixel; the maps in no order.
    corners = torch.tensor([[2, 2, 9, 8], [-6, -8, 30, 20], [40, 40, 60, 50], [3, 3, 3.2, 3.1]], dtype=torch.float64)
    rois = torch.cat([torch.tensor([[1.0], [0], [1], [0]], dtype=torch.float64), corners], 1)
    found = roi_align(maps, rois, 0.5, 2, 3, 2, aligned)
    assert found.shape == (4, 3, 2, 3)
    for k, (number, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c * 0.5 - (0.5 if aligned else 0) for c in box)
        width, height = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        ys = [y1 + height * (i + 0.5) / 4 for i in range(4)]
        xs = [x1 + width * (i + 0.5) / 6 for i in range(6)]
        for channel, image in enumerate(maps[int(number)]):
            points = torch.tensor([[at(image, y, x) for x in xs] for y in ys], dtype=torch.float64)
            bins = points.unfold(0, 2, 2).unfold(1, 2, 2).mean((2, 3))
            torch.testing.assert_close(found[k, channel], bins, rtol=1e-9, atol=1e-12)


@needs("torchvision")
def test_torchvision_uses_it_and_stays_as_it_is() -> None:
    torchvision = ready()
    assert ready() is torchvision
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.8, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    image = torch.arange(64.0).view(1, 1, 8, 8)
    regions = [torch.tensor([[0.0, 0, 8, 8]])]
    pooled = torchvision.ops.roi_align(image, regions, output_size=2, sampling_ratio=4, aligned=True)
    torch.testing.assert_close(pooled, image.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)), rtol=0.05, atol=0.1)


@pytest.mark.slow
@needs("torchvision", "timm")
def test_after_an_import_that_failed() -> None:
    code = """
try:
    import timm
except RuntimeError:
    pass
from tersenet.models.torchvision_cpu import ready
ready()
import timm, torchvision
print(timm.create_model("resnet18").num_classes, torchvision.models.resnet18().fc.out_features)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "1000 1000\n", done.stderr
