"""Ranges of the quantizers from training batches: what the Winograd-aware reference's warm-up flag was for."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from tersenet.data.bundle import first_tensor
from tersenet.nn.winograd import calibration
from tersenet.nn.winograd_quantizer import FakeQuantizer
from tersenet.train import distributed
from tersenet.train.batch import forward, move

if TYPE_CHECKING:
    from tersenet.data.bundle import Loader


def calibrate_ranges(
    model: nn.Module, loader: Loader, batches: int, *, device: torch.device, for_training: bool = False
) -> int:
    """Every quantizer's range becomes that of the first `batches` training batches, in evaluation mode; returns the
    number of images. Each layer already computes with what those before it round to.

    for_training: batch norms normalise by the batch, as they will in training. In a network that was never trained,
        their running statistics say nothing, and ranges taken with them would clip all that training makes.

    Where training is parallel every rank must call it; all get the ranges of rank 0's share.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    norms = [module for module in model.modules() if for_training and isinstance(module, _BatchNorm)]
    statistics = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    for norm in norms:
        norm.train()
    images = 0
    try:
        with torch.no_grad(), calibration(model):
            for inputs, _ in itertools.islice(loader.batches(0), batches):
                forward(model, move(inputs, device, channels_last=False))
                images += len(first_tensor(inputs))
    finally:
        for module, training in modes:
            module.training = training
        for buffer, values in statistics:
            buffer.copy_(values)
    share_ranges(model)
    return images


def share_ranges(model: nn.Module) -> None:
    """Every rank gets the ranges and learned scales of rank 0."""
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizer)]
    distributed.broadcast(tensor for quantizer in quantizers for tensor in quantizer.state_dict().values())
