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
from torch import Tensor

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


def _declare() -> None:
    """The two operators that torchvision registers shapes for when it is imported. It does not define them itself."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    _declared.append(library)


def _use_plain_torch(boxes: Any, roi_align: Any) -> None:
    boxes._assert_has_ops = lambda: None
    # torchvision's own RoI align in Python is compiled by torch.compile at its first call: that takes a C++ compiler
    # and tens of seconds.
    roi_align._roi_align = roi_align._roi_align.__wrapped__


def _forget(*packages: str) -> None:
    """Submodules that a failed import left: a second import would take them for whole."""
    for package in packages:
        if package not in sys.modules:
            for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
                del sys.modules[name]
