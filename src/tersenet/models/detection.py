"""The part of a torchvision detector that has channels: from a batch of images to the raw outputs of its heads.

A whole detector can be traced as it is, from a list of images to boxes. This part of it is for where tensors are
needed: it costs less to run, takes a batch, and its multiply-adds don't depend on how many boxes are found. The
channels are all in the backbone and the heads; between these only boxes are chosen and regions are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.models import torchvision_cpu


def image_part(detector: nn.Module) -> nn.Module:
    """`detector` with another forward: images (N, C, H, W), scaled and normalised, -> the heads' raw outputs.

    It shares everything with the detector: what `ModelGraph(image_part(detector), (images,))` prunes is pruned in the
    detector, whose own forward, training and state dict go on as before. The second stage of an R-CNN sees each whole
    feature map here in place of the proposals, so multiply-adds are those of one region per map.

    Raises:
        TersenetError: not a detector of torchvision.
    """
    detection = torchvision_cpu.ready().models.detection
    forwards: dict[type, Callable[..., Any]] = {
        detection.generalized_rcnn.GeneralizedRCNN: _rcnn,
        detection.RetinaNet: _one_stage,
        detection.FCOS: _one_stage,
        detection.ssd.SSD: _one_stage,
    }
    own = type(detector)
    forward = next((forward for kind, forward in forwards.items() if isinstance(detector, kind)), None)
    if forward is None:
        raise TersenetError(f"{own.__name__} is not a detector of torchvision: trace it as it is")
    part = object.__new__(type(f"{own.__name__}ImagePart", (own,), {"forward": forward}))
    object.__setattr__(part, "__dict__", vars(detector))
    return part


def _one_stage(self: Any, images: Tensor) -> Any:
    return self.head(list(_features(self, images).values()))


def _rcnn(self: Any, images: Tensor) -> Any:
    features = _features(self, images)
    found = [self.rpn.head(list(features.values()))]
    heads = self.roi_heads
    for kind in ("box", "mask", "keypoint"):
        pool = getattr(heads, f"{kind}_roi_pool", None)
        if pool is not None:
            head, predictor = getattr(heads, f"{kind}_head"), getattr(heads, f"{kind}_predictor")
            maps = [x for name, x in features.items() if name in pool.featmap_names]
            found.append([predictor(head(F.adaptive_avg_pool2d(x, pool.output_size))) for x in maps])
    return found


def _features(self: Any, images: Tensor) -> dict[str, Tensor]:
    features = self.backbone(images)
    return {"0": features} if isinstance(features, Tensor) else features
