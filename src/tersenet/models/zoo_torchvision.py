"""What `zoo` needs to know of torchvision: classification, segmentation, detection, video."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tersenet.data.registry import NORMALISATION, MeanStd
from tersenet.errors import TersenetError
from tersenet.models import torchvision_cpu

ARGUMENTS = {
    "num_classes": "classes",
    "image_size": "pixels",
    "min_size": "pixels",
    "max_size": "pixels",
    "aux_logits": "flag",
    "aux_loss": "flag",
    "transform_input": "flag",
}
_WITH_AUXILIARY = ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3")
_VIT_PIXELS = 224
_VIDEO_FRAMES = 16


def load() -> None:
    _models()


def names() -> Sequence[str]:
    return _models().list_models()


def known(name: str) -> bool:
    return name in names()


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    models = _models()
    own: dict[str, Any] = {}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        own["weights_backbone"] = None  # left out, a backbone's weights are downloaded
    if name in _WITH_AUXILIARY:
        # Heads that only training uses. What is traced for pruning is the network as it infers, which would leave them
        # as they are on channels that are gone.
        own |= {"aux_logits": False, "init_weights": True}
    return models.get_model(name, weights=None, **(own | dict(arguments)))


def shape(name: str, model: nn.Module) -> tuple[int, ...] | None:
    """(C, H, W); of a video network (C, frames, H, W)."""
    detector = getattr(model, "transform", None)
    if detector is not None:
        fixed = getattr(detector, "fixed_size", None)
        return (3, *fixed) if fixed else (3, detector.min_size[0], detector.min_size[0])
    made_for = _transforms(name)
    size = made_for.get("crop_size") or made_for.get("resize_size")
    if isinstance(size, int):
        size = getattr(model, "image_size", size)
        return (3, size, size)
    return (3, _VIDEO_FRAMES, *size) if size else None


def normalise(name: str) -> MeanStd | None:
    made_for = _transforms(name)
    if not made_for:
        return None  # a detector normalises its images itself
    mean, std = NORMALISATION["imagenet"]
    return tuple(made_for.get("mean", mean)), tuple(made_for.get("std", std))


def fitted(name: str, shape: tuple[int, ...] | None, classes: int | None, trained: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if shape is not None and shape[0] != 3:
        raise TersenetError(
            f"torchvision:{name} takes images of 3 channels, and these data have {shape[0]}: timm's networks take any"
        )
    if name.startswith("vit_"):
        pixels = shape[-1] if shape is not None else _transforms(name)["crop_size"]
        if pixels != _VIT_PIXELS:
            arguments["image_size"] = pixels
    if trained and name in _WITH_AUXILIARY:
        arguments["transform_input"] = True  # their weights come from TensorFlow, and its normalisation
    return arguments


def _transforms(name: str) -> dict[str, Any]:
    """How torchvision prepares images for the first published weights of this name."""
    weights = list(_models().get_model_weights(name))
    return dict(getattr(weights[0].transforms, "keywords", {})) if weights else {}


def _models() -> Any:
    return torchvision_cpu.ready().models
