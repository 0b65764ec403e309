"""The ResNet-18 variant of sparse Winograd convolution, for ImageNet: pre-activation, no strided 3x3 convolution."""

from __future__ import annotations

from torch import Tensor, nn

from tersenet.models.initialise import he_normal


class PoolBlock(nn.Module):
    """BN, ReLU, 3x3, BN, ReLU, 3x3, BN, beside a shortcut; no ReLU behind the sum.

    shortcut: what the input goes through beside the branch: projected where the shape changes, else a ReLU alone.
    """

    def __init__(self, C_in: int, C_out: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(C_in)
        self.relu0 = nn.ReLU()
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(C_out, C_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(C_out)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu0(self.bn0(x)))
        y = self.bn2(self.conv2(self.relu1(self.bn1(y))))
        return y + self.shortcut(x)


class PoolResNet(nn.Module):
    """(N, in_channels, H, W) -> (N, classes): 7x7 stem, four stages of two blocks, pools between them but not before
    the last (its map stays at 14 for 224x224 images), average pool, dropout, `fc`."""

    def __init__(self, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        layers: list[nn.Module] = [_pool()]
        C_in = width
        for stage, factor in enumerate((1, 2, 4, 8)):
            C_out = factor * width
            # Only the first stage normalises its shortcut: the stem has neither batch norm nor ReLU.
            head: list[nn.Module] = [nn.BatchNorm2d(C_in)] if stage == 0 else []
            projection = [nn.Conv2d(C_in, C_out, 1, bias=False), nn.BatchNorm2d(C_out)]
            layers.append(PoolBlock(C_in, C_out, nn.Sequential(*head, nn.ReLU(), *projection)))
            layers.append(PoolBlock(C_out, C_out, nn.ReLU()))
            if stage in (0, 1):
                layers.append(_pool())
            C_in = C_out
        self.features = nn.Sequential(*layers)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.15)
        self.fc = nn.Linear(C_in, classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.features(self.conv1(x)))
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


def _pool() -> nn.Module:
    return nn.MaxPool2d(3, 2, ceil_mode=True)


def pool_resnet18(classes: int = 1000, in_channels: int = 3, width: int = 64) -> PoolResNet:
    """The ResNet-18 whose 16 3x3 convolutions all have a stride of 1 and a BN and ReLU before them.

    Differs: the 7x7 stem is padded by 3 on all sides, where TensorFlow's SAME pads 2 before and 3 behind.
    Source: Liu et al., Efficient Sparse-Winograd Convolutional Neural Networks, ICLR 2018, and its published code.
    """
    return PoolResNet(classes, in_channels, width)
