"""A soft pruning run by hand: a graph, hooks and the state of a training that does not take place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tersenet.data.bundle import Data
from tersenet.graph.model import ModelGraph
from tersenet.methods.base import Context
from tersenet.methods.soft_filter_pruning import SoftFilterPruning, SoftPruning
from tersenet.results import Accuracy
from tersenet.train.hooks import TrainState
from tersenet.train.settings import Fit

SHAPE, CLASSES = (3, 8, 8), 4
CPU = torch.device("cpu")


class Batches:
    """Seeded noise with a class-dependent mean; the order depends on the epoch alone."""

    def __init__(self, n: int, batch: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.n, self.batch = n, batch
        self.y = torch.randint(0, CLASSES, (n,), generator=generator)
        pattern = torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(0))
        self.x = torch.randn(n, *SHAPE, generator=generator) + pattern[self.y]

    def __len__(self) -> int:
        return -(-self.n // self.batch)

    def batches(self, epoch: int) -> Any:
        order = torch.randperm(self.n, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(self.batch):
            yield self.x[index], self.y[index]


def tiny_data() -> Data:
    return Data("noise", Batches(32, 16, 1), Batches(16, 16, 2), Batches(16, 16, 3), CLASSES, SHAPE, ((0.0,), (1.0,)))


def settings(**changes: Any) -> SoftFilterPruning:
    fit = {"epochs": 4, "lr": 0.05, "weight_decay": 0.0} | changes.pop("fit", {})
    return SoftFilterPruning(**({"fit": fit, "rate": 0.3} | changes))


def context(**more: Any) -> Context:
    return Context(device=CPU, seed=0, **more)


def hooks_on(model: nn.Module, method: SoftFilterPruning, shape: tuple[int, ...] = SHAPE) -> SoftPruning:
    return method.hooks(ModelGraph(model, (torch.zeros(2, *shape),)), context())


def state_of(model: nn.Module, fit: Fit, optimizer: torch.optim.Optimizer | None = None) -> TrainState:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=fit.lr)
    nothing = Accuracy(n=0)
    return TrainState(model, None, optimizer, fit, 0, 0, CPU, lambda: nothing)


def zero_filters(weight: Tensor) -> list[int]:
    return torch.nonzero(weight.detach().flatten(1).eq(0).all(1)).flatten().tolist()
