"""Shared by the tests of sparse Winograd convolution: a small network, data, and a trained step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersenet.data.bundle import Data
from tersenet.graph.model import ModelGraph
from tersenet.graph.record import attach, record_of
from tersenet.methods.base import Context
from tersenet.methods.sparse_winograd import SparseTraining, SparseWinograd
from tersenet.train.loop import fit

CPU = torch.device("cpu")


class Net(nn.Module):
    """Four pairs: behind a pool, of a functional ReLU, of a shared one, and two layers behind one; and a trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.pooled = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.functional = nn.Conv2d(6, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 4, 3, padding=1)
        self.right = nn.Conv2d(6, 4, 3, padding=0)
        self.trunk = nn.Conv2d(4, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pooled(self.pool(self.relu(self.stem(x))))
        x = self.shared(self.relu(self.bn(x)))
        x = self.functional(nn.functional.relu(x))
        x = x.relu_()
        x = self.left(x)[:, :, 1:-1, 1:-1] + self.right(x)
        x = torch.relu(x)
        x = x + self.trunk(x)
        return self.head(self.point(x.relu()).mean((2, 3)))


PAIRS = {"pooled", "shared", "functional", "left", "right"}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


def images(n: int, seed: int = 1, side: int = 11) -> Tensor:
    return torch.randn(n, 2, side, side, generator=torch.Generator().manual_seed(seed))


class Batches:
    def __init__(self, count: int, rank: int = 0) -> None:
        self.count, self.n, self.rank = count, 4 * count, rank

    def __len__(self) -> int:
        return self.count

    def batches(self, epoch: int) -> Any:
        for number in range(self.count):
            yield images(4, 100 * self.rank + number + 10 * epoch), torch.arange(4) + number % 2


def data(count: int = 4, rank: int = 0) -> Data:
    loader = Batches(count, rank)
    return Data("noise", loader, loader, loader, classes=5, shape=(2, 11, 11), normalise=((0.0,) * 2, (1.0,) * 2))


def graph_of(model: nn.Module) -> ModelGraph:
    known = record_of(model)
    graph = ModelGraph(model, (images(2),))
    if known is None:
        attach(model, graph.record)
    return graph


def applied(model: nn.Module, **settings: Any) -> Context:
    """The step without its training."""
    context = Context(CPU, 0)
    SparseWinograd(**{"fit": {"epochs": 1}, **settings}).apply(graph_of(model), context)
    return context


def trained(
    model: nn.Module,
    seed: int = 0,
    checkpoint: Path | None = None,
    given: Data | None = None,
    hooks_type: type[SparseTraining] | None = None,
    **settings: Any,
) -> tuple[list[dict[str, Any]], Context]:
    """The step as the pipeline runs it: the rows of the training, and the notes."""
    method = SparseWinograd(**{"fit": {"epochs": 2, "lr": 0.05}, **settings})
    graph = graph_of(model)
    context = Context(CPU, 0, data=given or data())
    method.apply(graph, context)
    hooks = method.hooks(graph, context)
    if hooks_type is not None:
        hooks.__class__ = hooks_type
    assert context.data is not None
    arguments: dict[str, Any] = {"seed": seed, "device": CPU, "hooks": hooks, "checkpoint": checkpoint}
    rows = fit(model, context.data, method.fit, log=lambda row: None, **arguments)
    method.finish(graph, context, hooks)
    return rows, context
