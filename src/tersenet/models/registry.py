"""The built-in networks by name, and the published weight files that are known by their checksum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tersenet.errors import UnknownNameError

ZOO = ("timm", "torchvision")
"""Libraries whose networks have names too: `timm:resnet18`; see `tersenet.models.zoo`."""

_CIFAR = (3, 32, 32)
_IMAGENET = (3, 224, 224)
_RESNET = "He et al. 2016, Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385"
_PRERESNET = "He et al. 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027"
_VGG = "Simonyan and Zisserman 2015, Very Deep Convolutional Networks, https://arxiv.org/abs/1409.1556"
_WINOGRAD = "Fernandez-Marques et al. 2020, Winograd-aware Quantized Networks, https://arxiv.org/abs/2002.10711"
_LENET = "LeCun et al. 1998, Gradient-Based Learning Applied to Document Recognition, https://doi.org/10.1109/5.726791"
_SQUEEZENET = "Iandola et al. 2016, SqueezeNet, https://arxiv.org/abs/1602.07360"
_NAGADOMI = "nagadomi 2014, Kaggle CIFAR-10 solution, https://github.com/nagadomi/kaggle-cifar10-torch7"
_ALL_CNN = "Springenberg et al. 2015, Striving for Simplicity, https://arxiv.org/abs/1412.6806"
_SPARSE_WINOGRAD = "Liu et al. 2018, Efficient Sparse-Winograd CNNs, https://openreview.net/forum?id=HJzgZ3JCW"
_RESNEXT = "Xie et al. 2017, Aggregated Residual Transformations, https://arxiv.org/abs/1611.05431"


@dataclass(frozen=True)
class Entry:
    """One network: `builder` called with `arguments` makes it; `classes`, `in_channels`, `width` may be overridden."""

    name: str
    builder: str
    """`module:function`"""
    arguments: dict[str, int | bool]
    """what the name stands for: depth, kind of block ..."""
    input_shape: tuple[int, int, int]
    """(C, H, W)"""
    classes: int
    family: str
    source: str


@dataclass(frozen=True)
class Published:
    """A weight file of known accuracy. `normalise` names the normalisation of its training data."""

    file: str
    sha256: str
    model: str
    normalise: str
    top1: float
    """share of right answers on the test set, 0..1"""
    source: str


def _cifar(name: str, function: str, family: str, source: str, **arguments: int | bool) -> Entry:
    return Entry(name, f"tersenet.models.{function}", arguments, _CIFAR, 10, family, source)


def _imagenet(name: str, function: str, family: str, source: str, **arguments: int | bool) -> Entry:
    return Entry(name, f"tersenet.models.{function}", arguments, _IMAGENET, 1000, family, source)


def _entries() -> Iterator[Entry]:
    for projection, suffix in ((False, ""), (True, "_projection")):
        for depth in (8, 14, 20, 32, 44, 56, 110):
            name = f"resnet{depth}{suffix}"
            yield _cifar(name, "resnet_cifar:resnet_cifar", "CIFAR ResNet", _RESNET, depth=depth, projection=projection)
    for depth in (20, 32, 44, 56, 110, 164):
        name = f"preresnet{depth}"
        family = "CIFAR pre-activation ResNet"
        yield _cifar(name, "preresnet_cifar:preresnet_cifar", family, _PRERESNET, depth=depth, bottleneck=depth == 164)
    for depth in (11, 13, 16, 19):
        yield _cifar(f"vgg{depth}_bn_cifar", "vgg:vgg_cifar", "CIFAR VGG", _VGG, depth=depth)
    yield _cifar("winograd_resnet18", "winograd_resnet:winograd_resnet18", "Winograd-aware ResNet", _WINOGRAD)
    yield _cifar("lenet5", "lenet:lenet5", "LeNet", _LENET)
    yield _cifar("squeezenet_cifar", "squeezenet_cifar:squeezenet_cifar", "CIFAR SqueezeNet", _SQUEEZENET)
    yield _cifar("resnext20_8x16", "resnext_cifar:resnext_cifar", "CIFAR ResNeXt", _RESNEXT, depth=20, groups=8)
    sparse = "tersenet.models.sparse_winograd_cifar"
    yield _cifar("vgg_nagadomi", "sparse_winograd_cifar:vgg_nagadomi", "CIFAR VGG", _NAGADOMI, map=4)
    small, arguments = (3, 24, 24), {"map": 3}
    yield Entry("vgg_nagadomi_24", f"{sparse}:vgg_nagadomi", arguments, small, 10, "CIFAR VGG", _NAGADOMI)
    yield Entry("convpool_cnn_c", f"{sparse}:convpool_cnn_c", {}, _CIFAR, 100, "CIFAR all-convolutional", _ALL_CNN)
    family = "ResNet without strided 3x3 convolutions"
    yield _imagenet("pool_resnet18", "sparse_winograd_resnet:pool_resnet18", family, _SPARSE_WINOGRAD)
    for depth in (18, 34, 50, 101, 152):
        yield _imagenet(f"resnet{depth}", "resnet:resnet", "ResNet", _RESNET, depth=depth)
    for batch_norm, suffix in ((False, ""), (True, "_bn")):
        for depth in (11, 13, 16, 19):
            yield _imagenet(f"vgg{depth}{suffix}", "vgg:vgg", "VGG", _VGG, depth=depth, batch_norm=batch_norm)


ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _entries()}

PUBLISHED: tuple[Published, ...] = (
    Published(
        file="resnet20-12fca82f.th",
        sha256="12fca82f0bebc4135bf1f32f6e3710e61d5108578464b84fd6d7f5c1b04036c8",
        model="resnet20",
        normalise="imagenet",
        top1=0.9173,
        source="https://github.com/akamaster/pytorch_resnet_cifar10",
    ),
    Published(
        file="resnet56-4bfd9763.th",
        sha256="4bfd97631478d6b638d2764fd2baff3edb1d7d82252d54439343b6596b9b5367",
        model="resnet56",
        normalise="imagenet",
        top1=0.9339,
        source="https://github.com/akamaster/pytorch_resnet_cifar10",
    ),
)


def in_zoo(name: str) -> bool:
    """Whether `name` is a `timm:NAME` or `torchvision:NAME`; it may still be unknown there."""
    package, colon, _ = name.partition(":")
    return bool(colon) and package in ZOO


def entry(name: str) -> Entry:
    """Raises: UnknownNameError, with the nearest names."""
    if name not in ENTRIES:
        raise UnknownNameError(
            "model", name, ENTRIES, "`tersenet models` lists them all; others are timm:NAME, torchvision:NAME."
        )
    return ENTRIES[name]
