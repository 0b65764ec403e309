"""The ResNet-18 of the Winograd-aware paper: every 3x3 convolution has a stride of 1, for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

from tersenet.models.initialise import he_normal
from tersenet.models.resnet import BasicBlock, projection_shortcut

_STEM = 32


class WinogradResNet(nn.Module):
    """(N, in_channels, 32, 32) -> (N, classes): 3x3 stem of 32 channels, four stages of two basic blocks with width,
    2, 4 and 8 width channels; a 2x2 max-pool before each stage but the first takes the place of strides."""

    def __init__(self, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, _STEM, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.relu = nn.ReLU()
        self.layer1 = _stage(_STEM, width, pool=False)
        self.layer2 = _stage(width, 2 * width, pool=True)
        self.layer3 = _stage(2 * width, 4 * width, pool=True)
        self.layer4 = _stage(4 * width, 8 * width, pool=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(self.avgpool(x).flatten(1))


def _stage(C_in: int, C_out: int, pool: bool) -> nn.Sequential:
    shortcut = projection_shortcut(C_in, C_out, 1) if pool or C_in != C_out else None
    blocks = [BasicBlock(C_in, C_out, 1, shortcut), BasicBlock(C_out, C_out, 1, None)]
    return nn.Sequential(*([nn.MaxPool2d(2)] if pool else []), *blocks)


def winograd_resnet18(classes: int = 10, in_channels: int = 3, width: int = 64) -> WinogradResNet:
    """The paper's ResNet-18 with width multiplier `width` / 64. The stem has 32 channels whatever the width.

    Differs: convolutions are drawn from He's distribution, the reference's Winograd layers from Xavier's.
    Source: Fernandez-Marques et al., MLSys 2020, arXiv 2002.10711, and its code's layout.
    """
    return WinogradResNet(classes, in_channels, width)
