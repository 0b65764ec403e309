"""The CIFAR networks of sparse Winograd convolution: VGG-nagadomi and ConvPool-CNN-C."""

from __future__ import annotations

from torch import Tensor, nn

from tersenet.models.initialise import he_normal


class VGGNagadomi(nn.Module):
    """(N, in_channels, 8 `map`, 8 `map`) -> (N, classes): 2 + 2 + 4 convolutions, a 2x2 pool and dropout behind each
    stage, and three linear layers."""

    def __init__(self, classes: int, in_channels: int, width: int, map: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        C_in = in_channels
        for convolutions, factor in ((2, 1), (2, 2), (4, 4)):
            for _ in range(convolutions):
                layers += _unit(C_in, factor * width, 3)
                C_in = factor * width
            layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]
        self.features = nn.Sequential(*layers)
        hidden = 16 * width
        self.classifier = nn.Sequential(
            nn.Linear(C_in * map * map, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, classes),
        )
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class ConvPoolCNNC(nn.Module):
    """(N, in_channels, 32, 32) -> (N, classes): nine convolutions in three parts, 3x3 pools with a stride of 2 and
    dropout between them, 1x1 convolutions and an average over the map in the end."""

    def __init__(self, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        wide = 2 * width
        plan: list[tuple[int, int, int]] = [(in_channels, width, 3), (width, width, 3), (width, width, 3)]
        plan += [(width, wide, 3), (wide, wide, 3), (wide, wide, 3)]
        plan += [(wide, wide, 3), (wide, wide, 1), (wide, classes, 1)]
        layers: list[nn.Module] = [nn.Dropout(0.2)]
        for number, (C_in, C_out, kernel) in enumerate(plan):
            if number in (3, 6):
                # In ceil mode the map is halved exactly, as by TensorFlow's SAME.
                layers += [nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(0.5)]
            layers += _unit(C_in, C_out, kernel)
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.avgpool(self.features(x)).flatten(1)


def _unit(C_in: int, C_out: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(C_in, C_out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(C_out), nn.ReLU()]


def vgg_nagadomi(classes: int = 10, in_channels: int = 3, width: int = 64, map: int = 4) -> VGGNagadomi:
    """VGG-nagadomi: stages of `width`, 2 and 4 `width` channels; the linear layers have 16 `width`. `map` is the side
    of the last map: 4 for 32x32 images, 3 for the 24x24 crops of the original.

    Differs: batch norm behind every convolution, in place of their biases.
    Source: nagadomi/kaggle-cifar10-torch7; with batch norm as in the networks of Liu et al., ICLR 2018.
    """
    return VGGNagadomi(classes, in_channels, width, map)


def convpool_cnn_c(classes: int = 100, in_channels: int = 3, width: int = 96) -> ConvPoolCNNC:
    """ConvPool-CNN-C: three 3x3 convolutions of `width` channels, four of 2 `width`, two of 1x1.

    Differs: batch norm behind every convolution; the seventh is padded, so that its map stays even.
    Source: Springenberg et al. 2015, Striving for Simplicity, https://arxiv.org/abs/1412.6806, table 2.
    """
    return ConvPoolCNNC(classes, in_channels, width)
