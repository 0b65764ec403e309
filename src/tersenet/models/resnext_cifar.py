"""ResNeXt for 32x32 images: bottlenecks with grouped 3x3 convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.models.initialise import he_normal
from tersenet.models.resnet import projection_shortcut


class GroupedBottleneck(nn.Module):
    """1x1, grouped 3x3 with the stride, 1x1, beside a shortcut."""

    def __init__(self, C_in: int, C_mid: int, C_out: int, groups: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C_in, C_mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(C_mid)
        self.conv2 = nn.Conv2d(C_mid, C_mid, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(C_mid)
        self.conv3 = nn.Conv2d(C_mid, C_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(C_out)
        self.relu = nn.ReLU()
        self.downsample = projection_shortcut(C_in, C_out, stride) if stride != 1 or C_in != C_out else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + shortcut)


class ResNeXtCifar(nn.Module):
    """(N, in_channels, H, W) -> (N, classes): 3x3 stem of `width`, three stages of 4, 8 and 16 width, `linear`."""

    def __init__(self, blocks: int, groups: int, group_width: int, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        stages: list[nn.Module] = []
        C_in = width
        for stage in range(3):
            C_mid, C_out = groups * group_width * 2**stage, 4 * width * 2**stage
            made: list[nn.Module] = []
            for number in range(blocks):
                made.append(GroupedBottleneck(C_in, C_mid, C_out, groups, 2 if stage and not number else 1))
                C_in = C_out
            stages.append(nn.Sequential(*made))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(C_in, classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def resnext_cifar(depth: int, groups: int, classes: int = 10, in_channels: int = 3, width: int = 64) -> ResNeXtCifar:
    """The CIFAR ResNeXt of `depth` = 9n + 2 layers and `groups` groups; a group has `width` / 4 channels in the first
    stage: 16 at the usual width, so that depth 20 with 8 groups is ResNeXt-20 (8x16).

    Raises: TersenetError for a depth of another form.
    Source: Xie et al. 2017, Aggregated Residual Transformations, section 5.3; (8x16) from the Winograd-aware paper.
    """
    if depth < 11 or depth % 9 != 2:
        raise TersenetError(f"resnext_cifar(depth={depth}): depth must be 9n + 2: 11, 20, 29 ...")
    return ResNeXtCifar((depth - 2) // 9, groups, max(1, width // 4), classes, in_channels, width)
