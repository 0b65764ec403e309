"""MACs against counts done by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersenet.errors import TersenetError
from tersenet.measuring.macs import LayerCost, bytes_of, count_macs, layer_table, params_of


class Residual(nn.Module):
    """3 -> 8 stem, one basic block 8 -> 16 with stride 2 and a 1x1 projection, pooling, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 1, stride=2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.down(x))
        return self.fc(x.mean((2, 3)))


class Forward(nn.Module):
    """A module whose forward is the given function of itself and its inputs."""

    def __init__(self, function: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


IMAGE = torch.zeros(1, 8, 10, 12)


@pytest.mark.parametrize(
    ("layer", "example", "macs"),
    [
        (nn.Conv2d(8, 16, 3, padding=1), IMAGE, 10 * 12 * 16 * 8 * 9),
        (nn.Conv2d(8, 16, 3), IMAGE, 8 * 10 * 16 * 8 * 9),
        (nn.Conv2d(8, 16, (3, 5), stride=2, padding=(1, 2)), IMAGE, 5 * 6 * 16 * 8 * 15),
        (nn.Conv2d(8, 16, 3, dilation=2), IMAGE, 6 * 8 * 16 * 8 * 9),
        (nn.Conv2d(8, 16, 3, padding="same"), IMAGE, 10 * 12 * 16 * 8 * 9),
        (nn.Conv2d(8, 16, 3, padding=1, groups=4), IMAGE, 10 * 12 * 16 * 2 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), IMAGE, 10 * 12 * 8 * 9),
        (nn.Conv1d(4, 6, 5), torch.zeros(2, 4, 20), 2 * 16 * 6 * 4 * 5),
        (nn.Conv3d(2, 3, 3), torch.zeros(1, 2, 5, 6, 7), 3 * 4 * 5 * 3 * 2 * 27),
        # A transposed convolution spreads each input position: input size, not output size.
        (nn.ConvTranspose2d(8, 4, 3, stride=2), IMAGE, 10 * 12 * 8 * 4 * 9),
        (nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), IMAGE, 10 * 12 * 8 * 2 * 4),
        (nn.Linear(12, 5), torch.zeros(3, 12), 3 * 12 * 5),
        (nn.Linear(12, 5, bias=False), torch.zeros(3, 7, 12), 3 * 7 * 12 * 5),
        (nn.Linear(12, 5), torch.zeros(12), 12 * 5),
        (nn.LSTM(6, 7), torch.zeros(5, 1, 6), 5 * 4 * 7 * (6 + 7)),
        (Forward(lambda _, a: torch.einsum("bij,bjk->bik", a, a)), torch.zeros(2, 3, 3), 2 * 27),
        (Forward(lambda _, a: a @ a[0]), torch.zeros(4, 4), 16),
        (Forward(lambda _, a: a @ a), torch.zeros(9), 9),
        (nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)), IMAGE, 0),
    ],
)
def test_one_operator(layer: nn.Module, example: Tensor, macs: int) -> None:
    assert count_macs(layer, example) == (macs, [])


def test_residual_network_by_hand() -> None:
    stem = 16 * 16 * 8 * 3 * 9
    conv1, conv2, down, fc = 64 * 16 * 8 * 9, 64 * 16 * 16 * 9, 64 * 16 * 8, 160
    net, example = Residual(), torch.zeros(1, 3, 16, 16)
    assert count_macs(net, example) == (stem + conv1 + conv2 + down + fc, [])
    assert layer_table(net, example) == {
        "stem": LayerCost("conv 3x3", 3, 8, stem, 216),
        "conv1": LayerCost("conv 3x3", 8, 16, conv1, 1168),
        "conv2": LayerCost("conv 3x3", 16, 16, conv2, 2320),
        "down": LayerCost("conv 1x1", 8, 16, down, 144),
        "fc": LayerCost("linear", 16, 10, fc, 170),
    }


def test_macs_grow_with_the_batch() -> None:
    net = Residual()
    one, _ = count_macs(net, torch.zeros(1, 3, 16, 16))
    assert count_macs(net, torch.zeros(4, 3, 16, 16)) == (4 * one, [])


def test_what_has_no_formula_is_named() -> None:
    two = Forward(lambda self, a, b: self.mix(a, b), mix=nn.Bilinear(3, 4, 5))
    macs, uncounted = count_macs(two, (torch.zeros(2, 3), torch.zeros(2, 4)))
    assert (macs, uncounted) == (0, ["aten._trilinear"])
    light = Forward(lambda _, a: torch.lgamma(nn.functional.interpolate(a, scale_factor=2, mode="bilinear")))
    assert count_macs(light, IMAGE) == (0, [])


def test_foreign_operators_are_named() -> None:
    library = torch.library.Library("tersenet_test", "DEF")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", lambda x: x.clone(), "CompositeExplicitAutograd")
    net = Forward(lambda _, a: torch.ops.tersenet_test.mystery(a))
    assert count_macs(net, IMAGE) == (0, ["tersenet_test.mystery"])


@pytest.mark.parametrize("wrap", [lambda a, b: (a, b), lambda a, b: {"a": a, "b": b}])
def test_tuple_and_dict_examples(wrap: Any) -> None:
    net = Forward(lambda self, a, b: self.fc(a) + b, fc=nn.Linear(4, 3))
    assert count_macs(net, wrap(torch.zeros(2, 4), torch.zeros(3))) == (24, [])


def test_nested_example() -> None:
    net = Forward(lambda self, parts: self.fc(parts["x"][0]), fc=nn.Linear(4, 3))
    assert count_macs(net, ({"x": [torch.zeros(2, 4)]},)) == (24, [])


def test_original_is_untouched() -> None:
    net = Residual().train()
    net.cache = [torch.ones(2)]  # pyright: ignore[reportAttributeAccessIssue]
    state = copy.deepcopy(net.state_dict())
    parameters = list(net.parameters())
    count_macs(net, torch.randn(2, 3, 16, 16))
    layer_table(net, torch.randn(2, 3, 16, 16))
    assert net.training
    assert all(module.training for module in net.modules())
    assert all(a is b and a.device.type == "cpu" for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_tensors_outside_the_state_dict_are_moved_too() -> None:
    net = Forward(lambda self, a: self.fc(a) + self.offsets[0], fc=nn.Linear(4, 3))
    net.offsets = [torch.ones(3)]  # pyright: ignore[reportAttributeAccessIssue]
    assert count_macs(net, torch.zeros(1, 4)) == (12, [])


def test_layer_used_twice_counts_twice() -> None:
    net = Forward(lambda self, a: self.fc(self.fc(a)), fc=nn.Linear(4, 4))
    assert layer_table(net, torch.zeros(1, 4)) == {"fc": LayerCost("linear", 4, 4, 32, 20)}


def test_rows_add_up_with_products_outside_layers() -> None:
    inner = Forward(lambda self, a: self.fc(a) @ a.mT, fc=nn.Linear(4, 4))
    net = Forward(lambda self, a: self.inner(self.inner(a)[:, :, :4]) @ torch.zeros(5, 2), inner=inner)
    table = layer_table(net, torch.zeros(1, 5, 4))
    assert {name: cost.macs for name, cost in table.items()} == {"inner.fc": 160, "inner": 200, "": 50}
    assert sum(cost.macs for cost in table.values()) == count_macs(net, torch.zeros(1, 5, 4))[0]
    assert table["inner"].kind == "Forward"
    assert table["inner"].params == 0


def test_parametrised_weight_belongs_to_its_layer() -> None:
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    table = layer_table(nn.Sequential(conv), torch.zeros(1, 3, 8, 8))
    assert list(table) == ["0"]
    assert table["0"].kind == "conv 3x3"


def test_kinds() -> None:
    layers = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 1), groups=2),
        nn.ConvTranspose2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(960, 2),
    )
    kinds = [cost.kind for cost in layer_table(layers, IMAGE).values()]
    assert kinds == ["depthwise 3x3", "grouped 1x3", "transposed 1x1", "linear"]


@pytest.mark.parametrize("reads", [lambda _, a: a if a.sum() > 0 else -a, lambda _, a: a * a.max().item()])
def test_reading_values_is_refused(reads: Any) -> None:
    with pytest.raises(TersenetError, match=r"Forward can't be measured .*\(1, 8, 10, 12\).*must not read the values"):
        count_macs(Forward(reads), IMAGE)


def test_wrong_example_names_its_shape() -> None:
    with pytest.raises(TersenetError, match=r"example of shape \(1, 5, 16, 16\)"):
        layer_table(Residual(), torch.zeros(1, 5, 16, 16))


def test_params_and_bytes() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert params_of(net) == 16 + 4 + 8
    assert bytes_of(net) == 4 * (28 + 8) + 8  # running mean and variance, and the int64 batch counter
    assert bytes_of(net.half()) == 2 * 36 + 8


def test_shared_weights_count_once() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert params_of(nn.Sequential(first, second)) == 16
    assert bytes_of(nn.Sequential(first, second)) == 64
    second.weight = nn.Parameter(first.weight.detach())  # another parameter, the same memory
    assert bytes_of(nn.Sequential(first, second)) == 64
