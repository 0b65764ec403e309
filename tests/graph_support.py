"""Shared by the tests of the channel graph and of the methods: random batch norms, an independent reference, networks.

The reference is the original network with zeroed filters, built here from the graph's ends, without `compact`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.graph.compact import Compaction, Constants, compact
from tersenet.graph.labels import Residual
from tersenet.graph.model import Kept, ModelGraph
from tersenet.graph.replay import reference as reference_over_kept
from tersenet.measuring.macs import count_macs, params_of

BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, batch norm parameters and statistics as after some training; most constants come out positive."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.weight.copy_(1 + 0.3 * noise(module.weight))
                module.bias.copy_(0.5 + 0.3 * noise(module.bias))
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(0.3 * noise(module.running_mean))
                module.running_var.copy_(0.5 + noise(module.running_var).abs())
            elif getattr(module, "bias", None) is not None:
                module.bias.copy_(0.2 * noise(module.bias))
    return model.eval()


def random_kept(graph: ModelGraph, rate: float, seed: int = 0) -> Kept:
    """Some `1 - rate` of every group that can be pruned."""
    random = np.random.default_rng(seed)
    return {
        group.name: np.sort(random.permutation(group.size)[int(group.size * rate + 1e-9) :])
        for group in graph.groups
        if group.frozen is None
    }


@dataclass(frozen=True)
class Cut:
    """Entries of one tensor that belong to removed channels of a group. `filters`: they make the channels."""

    group: str
    tensor: str
    axis: int
    index: Tensor
    filters: bool


def cuts(graph: ModelGraph, kept: Kept) -> list[Cut]:
    found: list[Cut] = []
    for name, places in kept.items():
        group = graph.group(name)
        removed = np.setdiff1d(np.arange(group.size), places)
        for member in group.members:
            end = graph.ends[member.end]
            index = torch.from_numpy(member.places[removed].reshape(-1))
            for number, tensor in enumerate(end.tensors if end.role != "consume" else ()):
                if "running" not in tensor:
                    axis = min(end.axis, graph.tensor(tensor).dim() - 1)
                    found.append(Cut(name, tensor, axis, index, end.role == "produce" and number == 0))
    return found


def masked(model: nn.Module, found: list[Cut], silenced: Iterable[str] = ()) -> nn.Module:
    """A copy with the removed filters zero; in `silenced` groups also their biases and batch norms."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    for cut in found:
        if cut.filters or cut.group in set(silenced):
            state[cut.tensor].index_fill_(cut.axis, cut.index, 0)
    return model


def reference(graph: ModelGraph, kept: Kept) -> nn.Module:
    return masked(graph.model, cuts(graph, kept))


class DeadOutput(AssertionError):
    """The masked network puts out nothing but zeros."""


def compare_on(a: nn.Module, b: nn.Module, inputs: tuple[Any, ...]) -> float:
    """The largest difference, relative to the largest output."""
    with torch.no_grad():
        left, right = a(*inputs), b(*inputs)
    lefts = left if isinstance(left, (tuple, list)) else [left]
    rights = right if isinstance(right, (tuple, list)) else [right]
    assert [x.shape for x in lefts] == [x.shape for x in rights]
    scale = max(float(x.abs().max()) for x in lefts)
    if scale <= 1e-6:
        raise DeadOutput("an output of zeros proves nothing")
    return max(float((x - y).abs().max()) for x, y in zip(lefts, rights, strict=True)) / scale


class Called(nn.Module):
    """A function as a network."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def check_exact(
    model: nn.Module,
    example: tuple[Tensor, ...],
    residual: Residual = "coupled",
    rate: float = 0.4,
    constants: Constants = "auto",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[ModelGraph, Compaction]:
    """Compact a randomised `model` and compare it with the reference on inputs that `compact` has not seen."""
    model = randomise(model, seed).to(dtype)
    example = tuple(x.to(dtype) for x in example)
    graph = ModelGraph(model, example, residual)
    kept = random_kept(graph, rate, seed)
    predicted = graph.macs(kept), graph.params(kept)
    original, found, gone = copy.deepcopy(model), cuts(graph, kept), graph.removed(kept)
    done = compact(graph, kept, constants)
    expected = masked(original, found, done.zeroed)
    generator = torch.Generator().manual_seed(seed + 100)
    inputs = tuple(torch.randn(x.shape, generator=generator, dtype=dtype) for x in example)
    if ModelGraph(original, example, residual).found.statistics:
        # Means and variances over channels are those of the kept ones: zeroing is not removing there.
        masked_graph = ModelGraph(expected, example, residual)
        expected = Called(lambda *x: reference_over_kept(masked_graph, gone, x))
    assert compare_on(expected, model, inputs) <= (1e-10 if dtype == torch.float64 else 1e-5)
    assert predicted == (count_macs(model, example)[0] // graph.batch, params_of(model))
    return graph, done


def conv(C_in: int, C_out: int, k: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(C_in, C_out, k, stride, k // 2, groups=groups, bias=bias)


class ConvBN(nn.Sequential):
    """Convolution, batch norm, activation."""

    def __init__(self, C_in: int, C_out: int, k: int = 3, stride: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__(conv(C_in, C_out, k, stride, groups), nn.BatchNorm2d(C_out))
        if act:
            self.append(nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, C_in: int, C_out: int, stride: int) -> None:
        super().__init__()
        wide = 3 * C_in
        self.body = nn.Sequential(
            ConvBN(C_in, wide, 1), ConvBN(wide, wide, 3, stride, wide), ConvBN(wide, C_out, 1, act=False)
        )
        self.same = stride == 1 and C_in == C_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


class MobileNetV2(nn.Module):
    """Inverted residuals with depthwise convolutions, as in MobileNetV2, at a size for tests."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [InvertedResidual(8, 8, 1), InvertedResidual(8, 10, 2), InvertedResidual(10, 10, 1)]
        self.body = nn.Sequential(ConvBN(3, 8, 3, 2), *blocks, ConvBN(10, 24, 1))
        self.classifier = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, C_in: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(C_in), conv(C_in, 2 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), conv(2 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat((x, self.conv2(F.relu(self.norm2(y)))), 1)


class DenseNet(nn.Module):
    """Two dense blocks with a transition: every batch norm reads a concatenation of many layers' channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.block1 = nn.Sequential(DenseLayer(6, 5), DenseLayer(11, 5), DenseLayer(16, 5))
        self.transition = nn.Sequential(nn.BatchNorm2d(21), nn.ReLU(), conv(21, 10, 1), nn.AvgPool2d(2))
        self.block2 = nn.Sequential(DenseLayer(10, 5), DenseLayer(15, 5))
        self.norm = nn.BatchNorm2d(20)
        self.classifier = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.transition(self.block1(self.stem(x))))
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))
