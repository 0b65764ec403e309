"""The optimizer, and the running average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tersenet.errors import TersenetError
from tersenet.nn.winograd_quantizer import FakeQuantizer
from tersenet.nn.winograd_transforms import TransformMatrices
from tersenet.train.settings import Fit


def make_optimizer(model: nn.Module, settings: Fit) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW over every parameter that needs a gradient, with the same weight decay on all.

    But those of Winograd transforms and of learned scales, for which zero is no place to go, are a second group, called
    `undecayed`.

    Raises:
        TersenetError: there is no such parameter.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TersenetError("the network has no parameter that needs a gradient: there is nothing to train")
    own = {id(p) for m in model.modules() if isinstance(m, (TransformMatrices, FakeQuantizer)) for p in m.parameters()}
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in own]}]
    if own:
        undecayed = [p for p in parameters if id(p) in own]
        groups.append({"params": undecayed, "weight_decay": 0.0, "name": "undecayed"})
        groups[0]["name"] = "decayed"
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
        weight_decay=settings.weight_decay,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """A group may have a factor of its own."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Moves the parameters of `average` to those of `model` by 1 - min(decay, (1 + step) / (10 + step)).

    `step` is the number of steps done; the smaller decay of the first ones keeps short runs from ending with their
    first weights.
    Source: TensorFlow's ExponentialMovingAverage with `num_updates`.
    """
    decay = min(decay, (1 + step) / (10 + step))
    for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)


def copy_buffers(average: nn.Module, model: nn.Module) -> None:
    for copied, buffer in zip(average.buffers(), model.buffers(), strict=True):
        copied.copy_(buffer)
