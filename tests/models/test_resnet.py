"""The expected numbers, names and shapes are torchvision's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.models.build import build
from tersenet.models.resnet import resnet

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_parameter_counts(name: str, params: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name).parameters()) == params


@pytest.mark.parametrize(
    ("name", "blocks", "convolutions"),
    [("resnet18", (2, 2, 2, 2), 2), ("resnet50", (3, 4, 6, 3), 3), ("resnet152", (3, 8, 36, 3), 3)],
)
def test_state_dict_names_in_order(name: str, blocks: tuple[int, ...], convolutions: int) -> None:
    expected = ["conv1.weight", *(f"bn1.{n}" for n in NORM)]
    for stage, count in enumerate(blocks, 1):
        for i in range(count):
            block = f"layer{stage}.{i}"
            for k in range(1, convolutions + 1):
                expected += [f"{block}.conv{k}.weight", *(f"{block}.bn{k}.{n}" for n in NORM)]
            if i == 0 and (stage > 1 or convolutions == 3):
                expected += [f"{block}.downsample.0.weight", *(f"{block}.downsample.1.{n}" for n in NORM)]
    expected += ["fc.weight", "fc.bias"]
    with torch.device("meta"):
        assert list(build(name).state_dict()) == expected


def test_shapes() -> None:
    with torch.device("meta"):
        small, large = build("resnet18").state_dict(), build("resnet50").state_dict()
    assert small["conv1.weight"].shape == (64, 3, 7, 7)
    assert small["layer2.0.conv1.weight"].shape == (128, 64, 3, 3)
    assert small["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    assert small["fc.weight"].shape == (1000, 512)
    assert large["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert large["layer3.0.conv1.weight"].shape == (256, 512, 1, 1)
    assert large["layer3.0.conv2.weight"].shape == (256, 256, 3, 3)
    assert large["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert large["fc.weight"].shape == (1000, 2048)


def test_stride_of_a_bottleneck_is_in_its_3x3_convolution() -> None:
    with torch.device("meta"):
        model = build("resnet50")
    strides = [model.get_submodule(f"layer2.0.conv{k}").stride for k in (1, 2, 3)]
    assert strides == [(1, 1), (2, 2), (1, 1)]


def test_sizes_halve_five_times() -> None:
    model = resnet(18, width=4).eval()
    seen: list[int] = []
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(lambda *a: seen.append(a[2].shape[-1]))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert seen == [32, 16, 8, 4, 2]


def reference(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The paper's table 1, evaluated from the tensors alone."""

    def conv_norm(x: Tensor, conv: str, norm: str, stride: int) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return x * scale[:, None, None] + shift[:, None, None]

    x = F.max_pool2d(conv_norm(x, "conv1", "bn1", 2).relu(), 3, stride=2, padding=1)
    for stage in (1, 2, 3, 4):
        for i in range(sum(f"layer{stage}.{i}.conv1.weight" in state for i in range(100))):
            name, y = f"layer{stage}.{i}", x
            stride = 2 if stage > 1 and i == 0 else 1
            last = 3 if f"{name}.conv3.weight" in state else 2
            for k in range(1, last + 1):
                y = conv_norm(y, f"{name}.conv{k}", f"{name}.bn{k}", stride if k == last - 1 else 1)
                y = y if k == last else y.relu()
            if f"{name}.downsample.0.weight" in state:
                x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = (x + y).relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("depth", [18, 50])
def test_outputs_equal_those_of_the_plain_formula(depth: int) -> None:
    torch.manual_seed(0)
    model = resnet(depth, width=4).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.randn(2, 3, 65, 64)
    with torch.no_grad():
        expected = reference(model.state_dict(), x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("depth", [0, 20, 1001])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(TersenetError, match="depth must be one of 18, 34, 50, 101, 152"):
        resnet(depth)
