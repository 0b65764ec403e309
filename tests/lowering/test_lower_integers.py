"""Quantized networks lowered: layers on kernels in integers, what is put into them, and what stays on torch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.exporting.deploy import folded
from tersenet.graph.edits import Quantize, Winograd
from tersenet.kernels.int8 import usable_isas
from tersenet.lowering.integer_modules import IntegerConvolution, TorchInteger
from tersenet.lowering.integers import INT8
from tersenet.lowering.lower import Lowered, lower
from tersenet.nn.folded import fold
from tersenet.nn.group_shuffle import OrderedConv2d
from tersenet.nn.quantized import QuantizedConv2d
from tersenet.nn.quantized_operator import as_operator, is_operator
from tersenet.nn.winograd import WinogradConv2d, calibration
from tersenet.nn.winograd_quantizer import FakeQuantizer
from tersenet.nn.winograd_settings import Quantization, Quantizer, WinogradSettings

needs_bytes = pytest.mark.skipif(not usable_isas(), reason="this processor has no instructions for products of bytes")
EIGHT = Quantizer(bits=8)
DIRECT = Quantization(input=EIGHT, weight=EIGHT, output=EIGHT)


class Net(nn.Module):
    """A stem in floating point, Winograd layers with a residual, a direct one with a stride, batch norms behind all."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.down = nn.Conv2d(width, 40, 3, stride=2, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(k) for k in (width, width, 40))
        self.head = nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.norms[0](self.a(x)))
        x = F.relu(self.norms[1](self.b(y)) + x)
        return self.head(F.relu(self.norms[2](self.down(x))).mean((2, 3)))


def images(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 13, 11, generator=torch.Generator().manual_seed(seed))


def quantized(
    tile: int = 4, quantization: Quantization | None = None, direct: Quantization = DIRECT, width: int = 24
) -> Net:
    torch.manual_seed(0)
    net = Net(width)
    for norm in net.norms:
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
    settings = WinogradSettings(tile=tile, quantization=quantization or Quantization.tapwise(8))
    for name in ("a", "b"):
        Winograd(module=name, settings=settings).replay(net)
    Quantize(module="down", quantization=direct).replay(net)
    trained(net, [images(8, seed) for seed in range(1, 4)])
    return net


def trained(net: nn.Module, batches: list[Tensor]) -> None:
    """With ranges as training leaves them: no value lies where one range is a small fraction of another."""
    net.train()
    for module in net.modules():
        if isinstance(module, FakeQuantizer):
            module.settings = module.settings.model_copy(update={"momentum": 0.3})
    with torch.no_grad():
        for batch in batches:
            net(batch)
    net.eval()


def choices(net: Lowered) -> dict[str, str]:
    return {layer.name: layer.choice for layer in net.report.layers}


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@needs_bytes
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("kind", ["tapwise", "reference"])
def test_quantized_layers_run_in_integers(tile: int, kind: str) -> None:
    net = quantized(tile, Quantization.reference(8) if kind == "reference" else None)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fast = lower(net, images(), choice=None if tile == 4 else INT8)  # once measured
    assert [choices(fast)[name] for name in ("a", "b", "down")] == [INT8] * 3
    kinds = {layer.name: layer.kind for layer in fast.report.layers}
    assert kinds["a"] == f"8 bits F({tile}, 3) 24 -> 24, relu"
    assert kinds["b"] == f"8 bits F({tile}, 3) 24 -> 24 + residual, relu"
    assert kinds["down"] == "8 bits 3x3 24 -> 40 /2, relu"
    assert fast.report.folded == 3
    assert fast.report.error < 0.05
    for n in (1, 5):
        with torch.no_grad():
            assert apart(fast(images(n, 7)), net(images(n, 7))) < 0.02
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert isinstance(net.a, WinogradConv2d)


@needs_bytes
@pytest.mark.parametrize("width", [24, 32])
def test_levels_are_handed_on_without_a_change(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `a` to `b`, and from `b` to `down`: channels that fill up vectors, and nobody else reads them."""
    net = quantized(width=width)
    fast = lower(net, images(), choice=INT8)
    given = [one.gives for one in fast.graph.modules() if isinstance(one, IntegerConvolution)]
    assert [one is not None for one in given] == [width == 32, width == 32, False]
    monkeypatch.setattr("tersenet.lowering.lower.hand_on_levels", bool)
    plain = lower(net, images(), choice=INT8)
    for n in (1, 2, 3):
        assert torch.equal(fast(images(n, 4)), plain(images(n, 4)))
    # Modules as torch computes them: where operators are watched, or memory is in another order.
    for module in fast.graph.modules():
        if isinstance(module, IntegerConvolution):
            monkeypatch.setattr(module, "_known", Mock(return_value=None))
    with torch.no_grad():
        assert apart(fast.graph(images(2, 4)), net(images(2, 4))) < 0.02


@needs_bytes
def test_each_layer_is_next_to_equal() -> None:
    """Away from ties: ranges as training leaves them."""
    assert all(layer.error < 3e-3 for layer in lower(quantized(), images(4), choice=INT8).report.layers)


def test_torch_computes_what_the_network_does() -> None:
    net = quantized()
    fast = lower(net, images(), choice="torch")
    assert set(choices(fast).values()) == {"torch"}
    with torch.no_grad():
        assert apart(fast(images(3, 5)), net(images(3, 5))) < 0.02


@needs_bytes
def test_one_choice_for_all() -> None:
    fast = lower(quantized(), images(), choice=INT8)
    assert choices(fast) == {"stem": "direct", "a": INT8, "b": INT8, "down": INT8}


@needs_bytes
def test_a_folded_network_is_the_same() -> None:
    net = quantized()
    fast, again = lower(net, images(), choice=INT8), lower(folded(net), images(), choice=INT8)
    assert choices(again) == choices(fast)
    assert torch.equal(again(images(3, 2)), fast(images(3, 2)))


@needs_bytes
def test_fewer_bits_use_the_same_kernels_and_more_stay_on_torch() -> None:
    wide = Quantizer(bits=16)
    fast = lower(
        quantized(2, Quantization.tapwise(6, 9), Quantization(input=wide, weight=wide, output=wide)),
        images(),
        choice=INT8,
    )
    assert choices(fast)["a"] == choices(fast)["b"] == INT8
    assert choices(fast)["down"] == "torch"
    assert any("no generated kernels for down: its input has 16 bits" in note for note in fast.report.notes)


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ({"input": None}, {}, "its input is not rounded"),
        ({"weight": Quantizer(bits=12)}, {}, "its weight has 12 bits, and they multiply numbers of at most 8"),
        ({"output": Quantizer(bits=20)}, {}, "its output has 20 bits, of at most 16"),
        ({}, {"groups": 2}, "it has 2 groups of channels"),
    ],
)
def test_what_has_no_kernels_says_why(change: dict[str, object], shape: dict[str, int], message: str) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, **shape)  # pyright: ignore[reportArgumentType]
    net = nn.Sequential(QuantizedConv2d.from_conv(conv, DIRECT.model_copy(update=change)))
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad(), calibration(net):
        net(x)
    fast = lower(net.eval(), x, choice=INT8)
    assert choices(fast) == {"0": "torch"}
    assert any(f"for 0: {message}" in note for note in fast.report.notes)
    with torch.no_grad():
        assert apart(fast(x), net(x)) < 0.01


@pytest.mark.parametrize(
    ("quantization", "shape", "message"),
    [
        (Quantization.tapwise(8), {"stride": 2}, "has a stride"),
        (
            Quantization.tapwise(8).model_copy(update={"input_winograd": Quantizer(bits=8, per="tap_channel")}),
            {},
            "a scale for each channel",
        ),
        (Quantization.tapwise(8).model_copy(update={"input_winograd": None}), {}, "transformed input is not rounded"),
    ],
)
def test_winograd_layers_without_kernels(quantization: Quantization, shape: dict[str, int], message: str) -> None:
    settings = WinogradSettings(tile=2, quantization=quantization)
    net = nn.Sequential(WinogradConv2d(8, 8, 3, padding=1, settings=settings, **shape))  # pyright: ignore
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad(), calibration(net):
        net(x)
    fast = lower(net.eval(), x, choice=INT8)
    assert choices(fast) == {"0": "torch"}
    assert any(message in note for note in fast.report.notes)


@needs_bytes
@pytest.mark.parametrize("flex", ["full", "diagonal"])
def test_trained_transforms_have_kernels_of_their_own(flex: str) -> None:
    torch.manual_seed(0)
    settings = WinogradSettings.model_validate({"tile": 4, "flex": flex, "quantization": Quantization.tapwise(8)})
    layer = WinogradConv2d(20, 20, 3, padding=1, settings=settings)
    with torch.no_grad():
        for parameter in layer.transforms.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    net, x = nn.Sequential(layer), torch.randn(2, 20, 12, 12)
    trained(net, [torch.randn(2, 20, 12, 12) for _ in range(3)])
    fast = lower(net.eval(), x, choice=INT8)
    assert choices(fast) == {"0": INT8}
    with torch.no_grad():
        assert apart(fast(x), net(x)) < 0.01


@needs_bytes
def test_layers_with_orders_of_channels_and_other_padding() -> None:
    torch.manual_seed(0)
    conv = OrderedConv2d(8, 12, 3, padding=1, padding_mode="reflect")
    conv.take_order()
    conv.register_buffer("gather", torch.randperm(8))
    conv.register_buffer("scatter", torch.randperm(12))
    net = nn.Sequential(QuantizedConv2d.from_conv(conv, DIRECT), nn.BatchNorm2d(12), nn.ReLU())
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad(), calibration(net):
        net(x)
    nn.init.normal_(net[1].weight)  # pyright: ignore[reportArgumentType]
    nn.init.normal_(net[1].bias)  # pyright: ignore[reportArgumentType]
    fast = lower(net.eval(), x, choice=INT8)
    assert choices(fast) == {"0": INT8}
    assert fast.report.folded == 1
    with torch.no_grad():
        assert apart(fast(x), net(x)) < 0.01


def test_winograd_layers_in_floating_point_become_convolutions() -> None:
    net = nn.Sequential(WinogradConv2d(8, 8, 3, padding=1, settings=WinogradSettings(tile=4)), nn.ReLU())
    fast = lower(net.eval(), torch.randn(1, 8, 12, 12), choice="direct")
    assert [(layer.kind, layer.choice) for layer in fast.report.layers] == [("3x3 8 -> 8, relu", "direct")]


def test_without_kernels_torch_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersenet.kernels.int8.usable_isas", tuple)
    net = quantized()
    fast = lower(net, images(), choice=INT8)
    assert choices(fast)["a"] == "torch"
    assert any("no convolutions in 8-bit integers on this processor" in note for note in fast.report.notes)
    with torch.no_grad():
        assert apart(fast(images()), net(images())) < 0.02


@needs_bytes
def test_a_network_that_has_seen_nothing_is_refused() -> None:
    net = nn.Sequential(QuantizedConv2d.from_conv(nn.Conv2d(8, 8, 3), DIRECT)).eval()
    with pytest.raises(TersenetError, match="has no range yet"):
        lower(net, torch.randn(1, 8, 9, 9))


@needs_bytes
def test_a_limit_that_is_given_holds() -> None:
    net = quantized()
    with pytest.raises(TersenetError, match="more than the tolerance of 1e-12"):
        lower(net, images(), choice=INT8, tolerance=1e-12)


@pytest.mark.parametrize("name", ["a", "down"])
def test_the_operator_computes_what_the_folded_layer_does(name: str) -> None:
    layer = fold(quantized().get_submodule(name))  # pyright: ignore[reportArgumentType]
    x = torch.randn(2, 24, 9, 7)
    for one in (x, x.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            expected = layer(one)
            with as_operator():
                assert torch.equal(layer(one), expected)
                program = torch.export.export(nn.Sequential(layer), (one,), strict=False)
        assert torch.equal(program.module()(one), expected)
        assert sum("quantized_conv2d" in str(node.target) for node in program.graph.nodes) == 1


def test_threads_of_python_do_not_switch_the_operator_for_each_other() -> None:
    def other() -> bool:
        with as_operator():
            assert is_operator()
            inside.set()
            assert leave.wait(10)
        return is_operator()

    inside, leave = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(other)
        assert inside.wait(10)
        assert not is_operator()
        with as_operator():
            leave.set()
            assert not found.result()
            assert is_operator()
    assert not is_operator()


def test_torch_compile_can_read_what_asks_for_the_operator() -> None:
    def asks(x: Tensor) -> Tensor:
        return x + 1 if is_operator() else x + 2

    assert torch.equal(torch.compile(asks, fullgraph=True, backend="eager")(torch.zeros(2)), torch.full((2,), 2.0))


@needs_bytes
def test_whoever_watches_operators_sees_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = lower(quantized(), images(), choice=INT8)
    module = next(one for one in fast.graph.modules() if isinstance(one, IntegerConvolution))
    x = torch.randn(2, 24, 9, 7).contiguous(memory_format=torch.channels_last)
    seen: list[Tensor] = []

    def forward(self: TorchInteger, x: Tensor, residual: Tensor | None = None) -> Tensor:
        seen.append(x)
        return x

    monkeypatch.setattr(TorchInteger, "forward", forward)
    with torch.no_grad():
        module(x)
        assert not seen
        module(x.contiguous())  # in another order of memory
        assert len(seen) == 1
    module(x)  # gradients are asked for
    assert len(seen) == 2
