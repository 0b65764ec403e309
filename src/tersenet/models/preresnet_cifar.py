"""Pre-activation ResNets for 32x32 images: batch norm and ReLU before each convolution, the trunk is a plain sum."""

from __future__ import annotations

from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.models.initialise import he_normal


class PreActBasicBlock(nn.Module):
    """Two 3x3 convolutions. `downsample`, where there is one, takes the first activation, not the trunk."""

    expansion = 1

    def __init__(self, C_in: int, C_mid: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(C_in)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(C_in, C_mid, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(C_mid)
        self.conv2 = nn.Conv2d(C_mid, C_mid, 3, 1, 1, bias=False)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(self.relu(self.bn2(y)))
        return y + shortcut


class PreActBottleneck(nn.Module):
    """1x1 reduce (with the stride), 3x3, 1x1 expand by 4. `downsample` as in PreActBasicBlock."""

    expansion = 4

    def __init__(self, C_in: int, C_mid: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(C_in)
        self.relu = nn.ReLU()
        self.conv1 = nn.Conv2d(C_in, C_mid, 1, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(C_mid)
        self.conv2 = nn.Conv2d(C_mid, C_mid, 3, 1, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(C_mid)
        self.conv3 = nn.Conv2d(C_mid, C_mid * self.expansion, 1, bias=False)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(self.relu(self.bn2(y)))
        y = self.conv3(self.relu(self.bn3(y)))
        return y + shortcut


Block = type[PreActBasicBlock | PreActBottleneck]


class PreResNetCifar(nn.Module):
    """(N, in_channels, H, W) -> (N, classes): 3x3 stem, three stages, batch norm, ReLU, average pool, `linear`."""

    def __init__(self, block: Block, blocks: int, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.layer1 = _stage(block, width, width, blocks, 1)
        self.layer2 = _stage(block, width * block.expansion, 2 * width, blocks, 2)
        self.layer3 = _stage(block, 2 * width * block.expansion, 4 * width, blocks, 2)
        self.bn = nn.BatchNorm2d(4 * width * block.expansion)
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(4 * width * block.expansion, classes)
        he_normal(self)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.relu(self.bn(x))
        return self.linear(self.avgpool(x).flatten(1))


def _stage(block: Block, C_in: int, C_mid: int, blocks: int, stride: int) -> nn.Sequential:
    C_out = C_mid * block.expansion
    # Where the shape stays (the very first block of basic ones) the shortcut still splits off after the activation:
    # the paper's appendix does so behind the stem.
    downsample = nn.Identity() if C_in == C_out else nn.Sequential(nn.Conv2d(C_in, C_out, 1, stride, bias=False))
    rest = (block(C_out, C_mid, 1, None) for _ in range(blocks - 1))
    return nn.Sequential(block(C_in, C_mid, stride, downsample), *rest)


def preresnet_cifar(
    depth: int, bottleneck: bool = False, classes: int = 10, in_channels: int = 3, width: int = 16
) -> PreResNetCifar:
    """The pre-activation ResNet of `depth` = 6n + 2 layers, 9n + 2 with bottlenecks. `width`: channels of the stem.

    Raises: TersenetError for a depth of another form.
    Source: He et al. 2016, Identity Mappings in Deep Residual Networks, figure 4e and appendix; placing of stride and
        projections from KaimingHe/resnet-1k-layers.
    Differs: the basic networks change shape by projections too, as the authors' code does with bottlenecks.
    """
    layers = 9 if bottleneck else 6
    if depth < layers + 2 or depth % layers != 2:
        raise TersenetError(
            f"preresnet_cifar(depth={depth}, bottleneck={bottleneck}): "
            f"depth must be {layers}n + 2, at least {layers + 2}"
        )
    block = PreActBottleneck if bottleneck else PreActBasicBlock
    return PreResNetCifar(block, (depth - 2) // layers, classes, in_channels, width)
