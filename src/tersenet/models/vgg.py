"""VGG networks: for ImageNet with torchvision's state-dict names and shapes, and for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.models.initialise import he_normal

# 3x3 convolutions per stage; a 2x2 max-pool ends each of the five stages.
_STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
# Channels per stage, in units of `width`.
_WIDTHS = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """(N, C, H, W) -> (N, classes): `features`, average pool to `pooled` x `pooled`, `classifier`."""

    def __init__(self, features: nn.Sequential, pooled: int, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(pooled)
        self.classifier = classifier
        he_normal(self)
        for module in classifier.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _features(depth: int, batch_norm: bool, in_channels: int, width: int) -> nn.Sequential:
    if depth not in _STAGES:
        raise TersenetError(f"vgg(depth={depth}): depth must be one of {', '.join(map(str, _STAGES))}")
    layers: list[nn.Module] = []
    C_in = in_channels
    for convolutions, factor in zip(_STAGES[depth], _WIDTHS, strict=True):
        C_out = factor * width
        for _ in range(convolutions):
            layers.append(nn.Conv2d(C_in, C_out, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(C_out))
            layers.append(nn.ReLU())
            C_in = C_out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def vgg(depth: int, batch_norm: bool = False, classes: int = 1000, in_channels: int = 3, width: int = 64) -> VGG:
    """The VGG of `depth` layers: 13 convolutions and 3 linear layers in VGG-16.

    `width` is the number of channels of the first stage; the other stages (2, 4, 8, 8 times as many) and the hidden
    linear layers (64 times as many) scale with it.

    Raises: TersenetError for a depth that the paper does not have.
    Source: Simonyan and Zisserman 2015, Very Deep Convolutional Networks, table 1 (A, B, D, E); torchvision.models.vgg.
    """
    features = _features(depth, batch_norm, in_channels, width)
    hidden = 64 * width
    classifier = nn.Sequential(
        nn.Linear(_WIDTHS[-1] * width * 7 * 7, hidden),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(hidden, classes),
    )
    return VGG(features, 7, classifier)


def vgg_cifar(depth: int, classes: int = 10, in_channels: int = 3, width: int = 64) -> VGG:
    """The VGG of `depth` with batch norm for 32x32 images: the five pools leave 1x1, and one linear layer classifies.

    `width` as in `vgg`.

    Raises: TersenetError for a depth that the paper does not have.
    Source: the convolutions of `vgg`; the single linear layer as in kuangliu/pytorch-cifar, whose names these are.
    """
    features = _features(depth, True, in_channels, width)
    return VGG(features, 1, nn.Linear(_WIDTHS[-1] * width, classes))
