"""ResNets for ImageNet. State-dict names and shapes are torchvision's, so its published weights load."""

from __future__ import annotations

from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.models.initialise import he_normal


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; `downsample` is the shortcut where it is not the identity."""

    expansion = 1

    def __init__(self, C_in: int, C_mid: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C_in, C_mid, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(C_mid)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(C_mid, C_mid, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(C_mid)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + shortcut)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand by 4, beside a shortcut.

    Differs: the stride is in the 3x3 convolution, as in torchvision ("v1.5"), not in the first 1x1 as in the paper.
    """

    expansion = 4

    def __init__(self, C_in: int, C_mid: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        C_out = C_mid * self.expansion
        self.conv1 = nn.Conv2d(C_in, C_mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(C_mid)
        self.conv2 = nn.Conv2d(C_mid, C_mid, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(C_mid)
        self.conv3 = nn.Conv2d(C_mid, C_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(C_out)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + shortcut)


def projection_shortcut(C_in: int, C_out: int, stride: int) -> nn.Sequential:
    """1x1 convolution and batch norm: option B of the paper."""
    return nn.Sequential(nn.Conv2d(C_in, C_out, 1, stride, bias=False), nn.BatchNorm2d(C_out))


class ResNet(nn.Module):
    """(N, in_channels, H, W) -> (N, classes): 7x7 stem, max-pool, four stages, average pool, `fc`."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, ...], classes: int, in_channels: int, width: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage(block, width, width, blocks[0], 1)
        self.layer2 = _stage(block, width * block.expansion, 2 * width, blocks[1], 2)
        self.layer3 = _stage(block, 2 * width * block.expansion, 4 * width, blocks[2], 2)
        self.layer4 = _stage(block, 4 * width * block.expansion, 8 * width, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width * block.expansion, classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(block: type[BasicBlock | Bottleneck], C_in: int, C_mid: int, blocks: int, stride: int) -> nn.Sequential:
    C_out = C_mid * block.expansion
    downsample = projection_shortcut(C_in, C_out, stride) if stride != 1 or C_in != C_out else None
    rest = (block(C_out, C_mid, 1, None) for _ in range(blocks - 1))
    return nn.Sequential(block(C_in, C_mid, stride, downsample), *rest)


_DEPTHS: dict[int, tuple[type[BasicBlock | Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def resnet(depth: int, classes: int = 1000, in_channels: int = 3, width: int = 64) -> ResNet:
    """The ResNet of `depth` layers. `width` is the number of channels of the stem; all others scale with it.

    Raises: TersenetError for a depth that the paper does not have.
    Source: He et al. 2016, Deep Residual Learning for Image Recognition, table 1; names from torchvision.models.resnet.
    """
    if depth not in _DEPTHS:
        raise TersenetError(f"resnet(depth={depth}): depth must be one of {', '.join(map(str, _DEPTHS))}")
    block, blocks = _DEPTHS[depth]
    return ResNet(block, blocks, classes, in_channels, width)
