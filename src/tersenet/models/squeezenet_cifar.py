"""SqueezeNet for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersenet.models.initialise import he_normal

# Squeezed channels of the eight fire modules, in quarters of `width`; expanded ones are 4 times as many, twice.
_SQUEEZED = (1, 1, 2, 2, 3, 3, 4, 4)
_POOL_BEFORE = (2, 4)


class Fire(nn.Module):
    """Squeeze to few channels by 1x1, expand by 1x1 and 3x3 side by side; batch norm and ReLU behind each."""

    def __init__(self, C_in: int, C_mid: int, C_out: int) -> None:
        super().__init__()
        self.squeeze = _unit(C_in, C_mid, 1)
        self.expand1x1 = _unit(C_mid, C_out, 1)
        self.expand3x3 = _unit(C_mid, C_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat((self.expand1x1(x), self.expand3x3(x)), 1)


class SqueezeNetCifar(nn.Module):
    """(N, in_channels, 32, 32) -> (N, classes): 3x3 stem, eight fire modules on maps of 16, 8 and 4, 1x1 classifier,
    average pool."""

    def __init__(self, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_unit(in_channels, width, 3), nn.MaxPool2d(2)]
        C_in = width
        for number, quarters in enumerate(_SQUEEZED):
            if number in _POOL_BEFORE:
                layers.append(nn.MaxPool2d(2))
            layers.append(Fire(C_in, max(1, quarters * width // 4), quarters * width))
            C_in = 2 * quarters * width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(C_in, classes, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.avgpool(self.classifier(self.features(x))).flatten(1)


def _unit(C_in: int, C_out: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(C_in, C_out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(C_out), nn.ReLU())


def squeezenet_cifar(classes: int = 10, in_channels: int = 3, width: int = 64) -> SqueezeNetCifar:
    """SqueezeNet 1.1's fire modules, on the maps of a 32x32 image; all channels scale with `width`.

    Differs: the stem has a stride of 1; there is batch norm, as it is trained from random weights.
    Source: Iandola et al. 2016, SqueezeNet, arXiv 1602.07360; the arrangement for CIFAR is ours.
    """
    return SqueezeNetCifar(classes, in_channels, width)
