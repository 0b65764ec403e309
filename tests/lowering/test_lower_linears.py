"""Pruned linear layers of lowered networks: the same outputs by every kernel, and torch's own where those don't fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import tersenet as tn
from tersenet.kernels import host as host_of
from tersenet.lowering import assign, program
from tersenet.lowering.assign import distance
from tersenet.lowering.linears import LinearLayer, PrunedLinear, TorchLinear, build_linear
from tersenet.nn.masked import MaskedLinear


@torch.no_grad()
def pruned(layer: nn.Linear, density: float = 0.2, block: int = 16) -> nn.Linear:
    kept = torch.rand(-(-layer.out_features // block), layer.in_features) < density
    layer.weight.mul_(kept.repeat_interleave(block, 0)[: layer.out_features])
    return layer


def masked(layer: nn.Linear, density: float = 0.2) -> MaskedLinear:
    made = MaskedLinear.from_linear(layer)
    made.set_mask(torch.rand(1, layer.in_features, layer.out_features) < density)
    made.weight.data.masked_fill_(~made.mask, 7.0)  # pyright: ignore[reportArgumentType, reportOptionalOperand]
    return made


class Net(nn.Module):
    """Features, then linear layers: with a norm and ReLU, with a mask and SiLU, added to something, and a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 20, 3, padding=1), nn.AdaptiveAvgPool2d(4)
        self.a, self.norm = pruned(nn.Linear(320, 64)), nn.BatchNorm1d(64)
        self.b = masked(nn.Linear(64, 64))
        self.c = pruned(nn.Linear(64, 64, bias=False), block=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv(x).relu()).flatten(1)
        x = F.relu(self.norm(self.a(x)))
        y = F.silu(self.b(x))
        return self.head(self.c(x) + y)


def network() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(16, 3, 8, 8))  # statistics
    return net.eval()


def kinds(fast: nn.Module) -> list[str]:
    return [type(m).__name__ for m in fast.modules() if isinstance(m, (PrunedLinear, TorchLinear))]


@pytest.mark.parametrize("choice", ["sparse", "scattered", "torch"])
def test_a_network(choice: str) -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fast = tn.lower(net, torch.randn(2, 3, 8, 8), choice=choice)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            assert distance(fast(x), net(x)) <= 1e-5
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    rows = {row.name: row for row in fast.report.layers}
    assert list(rows) == ["conv", "a", "b", "c"]
    assert [rows[name].kind for name in "abc"] == [
        "linear 320 -> 64, relu", "linear 64 -> 64, silu", "linear 64 -> 64"
    ]  # fmt: skip
    assert fast.report.other["linear"] == 1  # the dense one
    for name in "abc":
        row = rows[name]
        assert row.density == pytest.approx(0.2, abs=0.05)
        assert row.input == (2, 320 if name == "a" else 64)
        assert row.error <= 1e-5
    wanted = {"sparse": ["sparse", "torch", "torch"], "scattered": ["scattered"] * 3, "torch": ["torch"] * 3}
    assert [rows[name].choice for name in "abc"] == wanted[choice]
    classes = {"torch": "TorchLinear"}
    assert sorted(kinds(fast)) == sorted(classes.get(one, "PrunedLinear") for one in wanted[choice])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs_stays_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 0)).eval()
    fast = tn.lower(net, torch.zeros(1, 3, 8, 8), choice="torch")
    assert fast(torch.zeros(2, 3, 8, 8)).shape == (2, 0)
    assert [row.name for row in fast.report.layers] == ["0"]


def test_nothing_is_shared_with_the_original() -> None:
    net = network()
    for choice in ("torch", "sparse"):
        fast, x = tn.lower(net, torch.randn(2, 3, 8, 8), choice=choice), torch.randn(1, 3, 8, 8)
        expected = fast(x).clone()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(0.5)
        assert torch.equal(fast(x), expected)


def test_a_masked_weight_is_computed_once_whatever_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no larger than what it is computed of."""
    monkeypatch.setattr(program, "_LARGEST_CONSTANT", 100)
    fast = tn.lower(network(), torch.randn(2, 3, 8, 8), choice="scattered")
    assert "masked_fill" not in fast.report.other
    assert [row.name for row in fast.report.layers] == ["conv", "a", "b", "c"]


@pytest.mark.parametrize(
    ("density", "block", "fitting"),
    [
        (0.2, 16, ["torch", "sparse", "scattered"]),
        (0.75, 16, ["torch", "sparse"]),  # an index for each weight is more than half of it
        (0.3, 1, ["torch", "scattered"]),  # hardly a block is empty
        (0.97, 16, ["torch"]),
        (1.0, 16, ["torch"]),
    ],
)
def test_what_fits(density: float, block: int, fitting: list[str]) -> None:
    torch.manual_seed(0)
    layer = LinearLayer("", pruned(nn.Linear(500, 64), density, block).weight.detach(), None, "none")
    assert [name for name in ("torch", "direct", "gemm", "F4", "sparse", "scattered") if layer.fits(name)] == fitting


@pytest.mark.parametrize("choice", ["sparse", "scattered"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
def test_each_kernel_on_inputs_of_any_form(choice: str, activation: str) -> None:
    torch.manual_seed(0)
    linear = pruned(nn.Linear(40, 30))
    layer = LinearLayer("", linear.weight.detach(), linear.bias.detach(), activation)
    kernel = build_linear(layer, choice)
    wide = torch.randn(3, 5, 60)
    forms: list[Tensor] = [
        wide[0, :, :40], wide[..., 10:50], wide[..., :40].transpose(0, 1), torch.randn(40), torch.zeros(0, 40),
        torch.randn(40, 7).t(), torch.randn(2, 40, 3, 4).permute(0, 2, 3, 1),
    ]  # fmt: skip
    for x in forms:
        before = x.clone()
        with torch.no_grad():
            expected = build_linear(layer, "torch")(x)
            torch.testing.assert_close(kernel(x), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(x, before)


def test_who_watches_sees_torch() -> None:
    torch.manual_seed(0)
    linear = pruned(nn.Linear(40, 30))
    kernel = build_linear(LinearLayer("", linear.weight.detach(), linear.bias.detach(), "relu"), "sparse")
    x = torch.randn(4, 40)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found = kernel(x)
    assert counter.get_total_flops() == 2 * 4 * 40 * 30
    torch.testing.assert_close(found, linear(x).relu())
    with pytest.raises(RuntimeError, match="Double"), torch.no_grad():  # torch says what is wrong
        kernel(x.double())


def test_a_kernel_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    built = assign.build

    def broken(layer: Any, choice: str, size: tuple[int, ...]) -> nn.Module:
        made = built(layer, choice, size)
        return nn.Sequential(made, nn.Threshold(0.5, 0.5)) if choice == "sparse" else made

    monkeypatch.setattr(assign, "build", broken)
    fast = tn.lower(network(), torch.randn(2, 3, 8, 8), choice="sparse")
    row = fast.report.layers[1]
    assert (row.name, row.choice, row.rejected) == ("a", "torch", ("sparse",))


def test_without_generated_kernels_torch_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_of, "ISAS", {})
    net, x = network(), torch.randn(2, 3, 8, 8)
    fast = tn.lower(net, x)
    assert any("no generated kernels" in note for note in fast.report.notes)
    assert [row.choice for row in fast.report.layers[1:]] == ["torch"] * 3
    with torch.no_grad():
        assert distance(fast(x), net(x)) <= 1e-5


def test_the_fastest_by_measurement() -> None:
    """In a network without convolutions, on three-dimensional inputs."""
    torch.manual_seed(0)
    net = nn.Sequential(pruned(nn.Linear(60, 40)), nn.ReLU(), masked(nn.Linear(40, 30)), nn.Linear(30, 3)).eval()
    fast = tn.lower(net, torch.randn(2, 7, 60))
    first, second = fast.report.layers
    assert set(first.times) == {"torch", "sparse", "scattered"}
    assert set(second.times) == {"torch", "scattered"}
    for row in (first, second):
        assert row.choice in row.times
    dense = f"{first.times['torch']:.3f}"
    assert re.search(rf"^0 +linear 60 -> 40, relu +2x7x60 +0\.\d+ +{first.choice} .* {dense} ", str(fast.report), re.M)
    x = torch.randn(5, 7, 60)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)
