"""What training borrows from its caller and gives back: the random generators, cuDNN's flag, a failed run's network."""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def own_randomness(device: torch.device) -> Generator[None]:
    """Inside, the global generators may be seeded and cuDNN is deterministic; afterwards both are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    deterministic = torch.backends.cudnn.deterministic
    # `torch.manual_seed` seeds every GPU.
    on_gpu = device.type == "cuda" or torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else ()):
        try:
            if device.type == "cuda":
                # Without it a resumed run would not be bit-equal.
                torch.backends.cudnn.deterministic = True
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.backends.cudnn.deterministic = deterministic


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Generator[None]:
    """If anything is raised inside, `model` gets back its weights, their memory order and device, and its modes."""
    modes = [(module, module.training) for module in model.modules()]
    # A clone keeps the memory order.
    kept = {name: tensor.detach().clone() for name, tensor in _tensors(model)}
    try:
        yield
    except BaseException:
        model.zero_grad(set_to_none=True)
        for name, tensor in _tensors(model):
            if name in kept:
                tensor.data = kept[name]
        for module, training in modes:
            module.training = training
        raise


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())
