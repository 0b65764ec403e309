from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.models.build import build
from tersenet.models.resnet_cifar import resnet_cifar
from tersenet.models.weights import load_weights, read_state_dict
from tersenet.nn.channel_pad import ZeroPadShortcut


def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The paper's network, evaluated from the tensors alone, without any of the modules under test."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1"))
    for stage in (1, 2, 3):
        blocks = sum(f"layer{stage}.{i}.conv1.weight" in state for i in range(100))
        for i in range(blocks):
            name = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            y = F.relu(norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
            y = norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
            if f"{name}.downsample.0.weight" in state:
                x = norm(F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
            elif stride == 2:
                extra = y.shape[1] - x.shape[1]
                zeros = y.new_zeros(len(x), extra, *y.shape[2:])
                x = torch.cat([zeros[:, : extra // 2], x[:, :, ::2, ::2], zeros[:, extra // 2 :]], 1)
            x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])


def randomise(model: nn.Module) -> None:
    """Batch norm with all its numbers at work."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


@pytest.mark.parametrize("width", [16, 5])
@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet14_projection"])
def test_outputs_equal_those_of_the_plain_formula(name: str, width: int) -> None:
    torch.manual_seed(0)
    model = build(name, width=width).eval()
    randomise(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = reference(model.state_dict(), x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        # each projection: a 1x1 convolution and two numbers of batch norm per channel
        ("resnet20_projection", 269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64),
    ],
)
def test_parameter_counts(name: str, params: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name).parameters()) == params


def test_shortcuts_are_modules_called_downsample() -> None:
    padded, projected = resnet_cifar(20), resnet_cifar(20, projection=True)
    shortcut = padded.get_submodule("layer2.0.downsample")
    assert isinstance(shortcut, ZeroPadShortcut)
    assert (shortcut.before, shortcut.after, shortcut.stride) == (8, 8, 2)
    assert [type(m) for m in projected.get_submodule("layer3.0.downsample")] == [nn.Conv2d, nn.BatchNorm2d]
    for model in (padded, projected):
        names = [name for name, _ in model.named_modules() if name.endswith(".downsample")]
        assert names == ["layer2.0.downsample", "layer3.0.downsample"]


def test_odd_difference_of_channels_pads_one_more_behind() -> None:
    shortcut = resnet_cifar(8, width=5).get_submodule("layer2.0.downsample")
    assert (shortcut.before, shortcut.after) == (2, 3)


def test_initialisation_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    model = resnet_cifar(8)
    weight = model.get_parameter("layer3.0.conv1.weight")
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert abs(weight.mean().item()) < 2e-3
    assert not model.linear.bias.any()


@pytest.mark.parametrize("depth", [2, 7, 18, 21, -4])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(TersenetError, match=rf"depth={depth}\): depth must be 6n \+ 2"):
        resnet_cifar(depth)


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "name", "top1"),
    [("resnet20-12fca82f.th", "resnet20", 0.9173), ("resnet56-4bfd9763.th", "resnet56", 0.9339)],
)
def test_published_weights_load_and_compute_the_same(file: str, name: str, top1: float) -> None:
    folder = os.environ.get("TERSENET_TEST_DATA")
    if not folder:
        pytest.skip("TERSENET_TEST_DATA names no folder with weights")
    path = Path(folder) / "weights" / file
    model = build(name).eval()
    known = load_weights(model, path)
    assert known is not None
    assert (known.model, known.file, known.normalise, known.top1) == (name, file, "imagenet", top1)
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        expected = reference(read_state_dict(path), x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
