"""Batch norm statistics estimated anew, for weights that were changed after training."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from tersenet.train import distributed
from tersenet.train.batch import forward, move

if TYPE_CHECKING:
    from tersenet.data.bundle import Loader


def recalibrate_bn(model: nn.Module, loader: Loader, batches: int, *, device: torch.device) -> None:
    """Running mean and variance of every batch norm become the averages over the first `batches` training batches.

    Where training is parallel every rank must call it; all get the statistics of rank 0's share.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    for norm in norms:
        norm.train()
    try:
        with torch.no_grad():
            for inputs, _ in itertools.islice(loader.batches(0), batches):
                forward(model, move(inputs, device, channels_last=False))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    distributed.broadcast(buffer for norm in norms for buffer in norm.buffers())
