"""torchvision beside a torch that its compiled operators don't load with, such as its CUDA build beside a CPU torch.

Importing it then fails (`operator torchvision::nms does not exist`), and timm's import with it. Where importing works,
`ready` does nothing else. Only where it fails in that way are the operators declared, with plain torch in the place of
what detectors need: non-maximum suppression and RoI align. Everything else that is compiled (deformable convolution,
position-sensitive RoI pooling, image decoding) stays missing, with torchvision's own message.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_declared: list[torch.library.Library] = []  # a Library that is dropped takes its operators with it


def ready() -> ModuleType:
    """torchvision, imported, whether or not its compiled operators load.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declared:
            raise
    _forget("torchvision", "timm")
    _declare()
    found = importlib.import_module("torchvision")
    _use_plain_torch(*(importlib.import_module(f"torchvision.ops.{name}") for name in ("boxes", "roi_align")))
    return found


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: the indices of the boxes that are kept, by falling score.

    Args:
        boxes: (N, 4), x1 y1 x2 y2.
        scores: (N,); of equal ones the first goes first.
        iou_threshold: a box is dropped if it overlaps a kept one of higher score by more than this.
    """
    order = scores.argsort(descending=True, stable=True)
    x1, y1, x2, y2 = boxes[order].unbind(1)
    areas = (x2 - x1) * (y2 - y1)
    dropped = torch.zeros(len(order), dtype=torch.bool)
    kept: list[int] = []
    for i in range(len(order)):
        if dropped[i]:
            continue
        kept.append(i)
        width = (x2[i:].clamp(max=x2[i]) - x1[i:].clamp(min=x1[i])).clamp(min=0)
        height = (y2[i:].clamp(max=y2[i]) - y1[i:].clamp(min=y1[i])).clamp(min=0)
        overlap = width * height
        dropped[i:] |= overlap / (areas[i] + areas[i:] - overlap) > iou_threshold
    return order[kept]


def roi_align(maps: Tensor, rois: Tensor, scale: float, height: int, width: int, samples: int, aligned: bool) -> Tensor:
    """Maps averaged in boxes, (K, C, height, width): bilinear values at `samples` x `samples` points of every bin.

    A point more than one pixel outside of a map counts as zero. Gradients go to the maps only, as in torchvision.

    Args:
        maps: (N, C, H, W).
        rois: (K, 5): the number of the map, then x1 y1 x2 y2 in pixels of the image.
        scale: pixels of a map per pixel of the image.
        aligned: pixels are squares around their coordinates, and boxes may be smaller than one.

    Source: Mask R-CNN (He et al., 2017), section 3; torchvision's documentation of `roi_align`.
    """
    x1, y1, x2, y2 = (rois[:, 1:].detach() * scale - (0.5 if aligned else 0.0)).unbind(1)
    sizes = [x2 - x1, y2 - y1] if aligned else [(x2 - x1).clamp(min=1), (y2 - y1).clamp(min=1)]
    xs, ys = _points(x1, sizes[0], width * samples), _points(y1, sizes[1], height * samples)
    inside = _inside(ys, maps.shape[2])[:, :, None] & _inside(xs, maps.shape[3])[:, None, :]
    grid = torch.stack(
        [
            _normalised(xs, maps.shape[3])[:, None, :].expand(inside.shape),
            _normalised(ys, maps.shape[2])[:, :, None].expand(inside.shape),
        ],
        dim=3,
    )
    number = rois[:, 0].long()
    found: list[Tensor] = []
    order: list[Tensor] = []
    for image in range(len(maps)):
        places = (number == image).nonzero()[:, 0] if len(maps) > 1 else torch.arange(len(rois), device=rois.device)
        # One long image of points: (1, C, K * height * samples, width * samples).
        points = grid[places].flatten(0, 1)[None].to(maps.dtype)
        values = nn.functional.grid_sample(
            maps[image : image + 1], points, mode="bilinear", padding_mode="border", align_corners=True
        )
        values = values * inside[places].flatten(0, 1).to(maps.dtype)
        bins = nn.functional.avg_pool2d(values, samples)[0]
        found.append(bins.unflatten(1, (len(places), height)).transpose(0, 1))
        order.append(places)
    return torch.cat(found)[torch.cat(order).argsort()] if len(maps) > 1 else found[0]


def _points(start: Tensor, size: Tensor, count: int) -> Tensor:
    """(K, count) points in the middles of `count` equal parts."""
    middles = (torch.arange(count, device=start.device, dtype=start.dtype) + 0.5) / count
    return start[:, None] + size[:, None] * middles


def _inside(points: Tensor, size: int) -> Tensor:
    return (points >= -1) & (points <= size)


def _normalised(points: Tensor, size: int) -> Tensor:
    """Pixels as `grid_sample` counts them, from -1 to 1."""
    return points.clamp(0, size - 1) * (2 / max(size - 1, 1)) - 1


def _declare() -> None:
    """The two operators that torchvision registers shapes for when it is imported. It does not define them itself."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    _declared.append(library)


def _use_plain_torch(boxes: Any, regions: Any) -> None:
    boxes._assert_has_ops = lambda: None
    # torchvision's own RoI align in Python is compiled by torch.compile at its first call: that takes a C++ compiler
    # and tens of seconds. Not compiled it takes seconds and gigabytes for a thousand boxes.
    slow = regions._roi_align.__wrapped__

    def align(maps: Tensor, rois: Tensor, scale: float, height: int, width: int, samples: int, aligned: bool) -> Tensor:
        if samples <= 0 or len(rois) == 0:  # as many points as a box has pixels: another number for every box
            return slow(maps, rois, scale, height, width, samples, aligned)
        return roi_align(maps, rois, scale, height, width, samples, aligned)

    regions._roi_align = align


def _forget(*packages: str) -> None:
    """Submodules that a failed import left: a second import would take them for whole."""
    for package in packages:
        if package not in sys.modules:
            for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
                del sys.modules[name]
