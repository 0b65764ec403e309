"""What `zoo` needs to know of timm."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tersenet.data.registry import MeanStd
from tersenet.models import torchvision_cpu

ARGUMENTS = {
    "num_classes": "classes",
    "in_chans": "channels",
    "img_size": "pixels",
    "drop_rate": "share",
    "drop_path_rate": "share",
}


def load() -> None:
    _timm()


def names() -> Sequence[str]:
    return _timm().list_models()


def known(name: str) -> bool:
    """`resnet18`, and with one of its weights' tags `resnet18.a1_in1k`, whose input size then counts."""
    timm = _timm()
    architecture, _, tag = name.partition(".")
    return timm.is_model(architecture) and (not tag or name in timm.list_pretrained(f"{architecture}.*"))


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # renamed networks, and what torch says of timm's scripted functions
        return _timm().create_model(name, pretrained=False, **arguments)


def shape(name: str, model: nn.Module) -> tuple[int, ...] | None:
    return (getattr(model, "pretrained_cfg", None) or {}).get("input_size")


def normalise(name: str) -> MeanStd | None:
    config = _timm().get_pretrained_cfg(name)
    return None if config is None else (tuple(config.mean), tuple(config.std))


def fitted(name: str, shape: tuple[int, ...] | None, classes: int | None, trained: bool) -> dict[str, Any]:
    config = _timm().get_pretrained_cfg(name)
    arguments = {} if classes is None else {"num_classes": classes}
    if shape is not None and config is not None:
        if shape[0] != config.input_size[0]:
            arguments["in_chans"] = shape[0]
        if config.fixed_input_size and shape[-1] != config.input_size[-1]:
            arguments["img_size"] = shape[-1]
    return arguments


def _timm() -> Any:
    torchvision_cpu.ready()
    return importlib.import_module("timm")  # an extra, which need not be there when types are checked
