"""The expected numbers, names and shapes are torchvision's; those of the CIFAR networks are kuangliu's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tersenet.errors import TersenetError
from tersenet.models.build import build
from tersenet.models.vgg import vgg, vgg_cifar


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("vgg11", 132_863_336),
        ("vgg13", 133_047_848),
        ("vgg16", 138_357_544),
        ("vgg19", 143_667_240),
        ("vgg11_bn", 132_868_840),
        ("vgg13_bn", 133_053_736),
        ("vgg16_bn", 138_365_992),
        ("vgg19_bn", 143_678_248),
        ("vgg16_bn_cifar", 14_728_266),
    ],
)
def test_parameter_counts(name: str, params: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name).parameters()) == params


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("vgg11", (0, 3, 6, 8, 11, 13, 16, 18)),
        ("vgg16", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
        ("vgg11_bn", (0, 4, 8, 11, 15, 18, 22, 25)),
        ("vgg16_bn", (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)),
    ],
)
def test_state_dict_names_in_order(name: str, convolutions: tuple[int, ...]) -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected: list[str] = []
    for i in convolutions:
        expected += [f"features.{i}.weight", f"features.{i}.bias"]
        if name.endswith("_bn"):
            expected += [f"features.{i + 1}.{n}" for n in norm]
    expected += [f"classifier.{i}.{n}" for i in (0, 3, 6) for n in ("weight", "bias")]
    with torch.device("meta"):
        assert list(build(name).state_dict()) == expected


def test_shapes() -> None:
    with torch.device("meta"):
        state = build("vgg16").state_dict()
    assert state["features.0.weight"].shape == (64, 3, 3, 3)
    assert state["features.28.weight"].shape == (512, 512, 3, 3)
    assert state["classifier.0.weight"].shape == (4096, 512 * 7 * 7)
    assert state["classifier.6.weight"].shape == (1000, 4096)


@pytest.mark.parametrize(("depth", "convolutions"), [(11, 8), (13, 10), (16, 13), (19, 16)])
def test_cifar_network_has_five_pools_and_one_linear_layer(depth: int, convolutions: int) -> None:
    model = vgg_cifar(depth, width=2).eval()
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.Conv2d) == kinds.count(nn.BatchNorm2d) == convolutions
    assert (kinds.count(nn.MaxPool2d), kinds.count(nn.Linear)) == (5, 1)
    assert model.features(torch.randn(1, 3, 32, 32)).shape == (1, 16, 1, 1)
    assert isinstance(model.classifier, nn.Linear)


def test_order_of_layers() -> None:
    model = vgg(11, batch_norm=True, width=2)
    assert [type(m) for m in model.features][:4] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    linear = [nn.Linear, nn.ReLU, nn.Dropout]
    assert [type(m) for m in model.classifier.children()] == [*linear, *linear, nn.Linear]


def test_width_scales_every_layer() -> None:
    model = vgg(16, width=3, classes=5)
    convolutions = [m.out_channels for m in model.features if isinstance(m, nn.Conv2d)]
    assert convolutions == [3, 3, 6, 6, 12, 12, 12, *[24] * 6]
    assert [m.out_features for m in model.classifier.children() if isinstance(m, nn.Linear)] == [192, 192, 5]


@pytest.mark.parametrize("make", [vgg, vgg_cifar])
def test_other_depths_are_refused(make: type[nn.Module]) -> None:
    with pytest.raises(TersenetError, match=r"depth=12\): depth must be one of 11, 13, 16, 19"):
        make(12)
