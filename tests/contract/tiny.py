"""Seven tiny networks, each with one thing that a method must get right. All take (N, 3, 8, 8) and give 4 classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 4


def _conv(C_in: int, C_out: int, k: int = 3, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(C_in, C_out, k, padding=k // 2, groups=groups, bias=bias)


class Plain(nn.Module):
    """Convolutions with biases, batch norm, pooling, and a linear layer that reads flattened images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 8, bias=True), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = _conv(8, 10, bias=True), nn.BatchNorm2d(10)
        self.fc = nn.Linear(10 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(x.flatten(1))


class Residual(nn.Module):
    """Two blocks on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = _conv(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = _conv(8, 6), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = _conv(6, 8), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = _conv(8, 8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        x = F.relu(x + self.bn3(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side, the batch norm behind the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = _conv(3, 6), _conv(3, 5, 1)
        self.bn = nn.BatchNorm2d(11)
        self.conv = _conv(11, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(torch.cat((self.left(x), self.right(x)), 1)))
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual without its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = _conv(3, 10, 1), nn.BatchNorm2d(10)
        self.depthwise, self.bn2 = _conv(10, 10, groups=10), nn.BatchNorm2d(10)
        self.project, self.bn3 = _conv(10, 6, 1), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.expand(x)))
        x = F.relu6(self.bn2(self.depthwise(x)))
        return self.fc(F.relu(self.bn3(self.project(x))).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = _conv(3, 12), nn.BatchNorm2d(12)
        self.conv1, self.bn1 = _conv(12, 12, groups=2), nn.BatchNorm2d(12)
        self.conv2 = _conv(12, 8, groups=2)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(F.relu(self.bn(self.stem(x))))))
        N, C, H, W = x.shape
        x = x.view(N, 2, C // 2, H, W).transpose(1, 2).reshape(N, C, H, W)
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


class SharedReLU(nn.Module):
    """One ReLU module in four places, and a convolution that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.stem, self.bn = _conv(3, 8), nn.BatchNorm2d(8)
        self.conv = _conv(8, 8)
        self.last = _conv(8, 6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(self.conv(self.relu(self.conv(x))))
        return self.fc(self.relu(self.last(x)).mean((2, 3)))


class TwoInputs(nn.Module):
    """Two images, a branch for each, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.bn1 = _conv(3, 8), nn.BatchNorm2d(8)
        self.right, self.bn2 = _conv(1, 8), nn.BatchNorm2d(8)
        self.conv = _conv(8, 6)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.left(x)) + self.bn2(self.right(y)))
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


NETWORKS: dict[str, type[nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "concat": Concat,
    "depthwise": Depthwise,
    "grouped": Grouped,
    "shared_relu": SharedReLU,
    "two_inputs": TwoInputs,
}


class FrozenOnly(nn.Module):
    """Nothing in it can be cut: what its only convolution makes is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _conv(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))
