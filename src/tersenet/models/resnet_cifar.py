"""ResNets for 32x32 images: three stages of basic blocks, shortcut A (zero channels) or projections."""

from __future__ import annotations

from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.models.initialise import he_normal
from tersenet.models.resnet import BasicBlock, projection_shortcut
from tersenet.nn.channel_pad import ZeroPadShortcut


class ResNetCifar(nn.Module):
    """(N, in_channels, H, W) -> (N, classes): 3x3 stem, stages of width, 2 width, 4 width, average pool, `linear`."""

    def __init__(self, blocks: int, projection: bool, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, 1, projection)
        self.layer2 = _stage(width, 2 * width, blocks, 2, projection)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2, projection)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(4 * width, classes)
        he_normal(self)
        nn.init.kaiming_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def _stage(C_in: int, C_out: int, blocks: int, stride: int, projection: bool) -> nn.Sequential:
    rest = (BasicBlock(C_out, C_out, 1, None) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(C_in, C_out, stride, _shortcut(C_in, C_out, stride, projection)), *rest)


def _shortcut(C_in: int, C_out: int, stride: int, projection: bool) -> nn.Module | None:
    if C_in == C_out:
        return None
    if projection:
        return projection_shortcut(C_in, C_out, stride)
    before = (C_out - C_in) // 2
    return ZeroPadShortcut(before, C_out - C_in - before, stride)


def resnet_cifar(
    depth: int, projection: bool = False, classes: int = 10, in_channels: int = 3, width: int = 16
) -> ResNetCifar:
    """The CIFAR ResNet of `depth` = 6n + 2 layers. `width` is the number of channels of the first stage.

    Raises: TersenetError for a depth of another form.
    Source: He et al. 2016, Deep Residual Learning, section 4.2; initialisation of the classifier and module names from
        akamaster/pytorch_resnet_cifar10, whose published weights load.
    """
    if depth < 8 or depth % 6 != 2:
        raise TersenetError(f"resnet_cifar(depth={depth}): depth must be 6n + 2: 8, 14, 20, 32, 44, 56, 110 ...")
    return ResNetCifar((depth - 2) // 6, projection, classes, in_channels, width)
