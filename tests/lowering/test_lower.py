"""The lowered network computes what the original does, for every kernel, batch size and kind of network."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import tersenet as tn
from graph.random_networks import RandomNetwork
from graph_support import randomise
from tersenet.api import open_model
from tersenet.graph.trace import tensors_in
from tersenet.kernels import host as host_of
from tersenet.lowering import choose
from tersenet.lowering.layers import WINOGRAD, Layer, has_amx, needs_amx
from tersenet.lowering.modules import build as build_kernel
from tersenet.models.build import build
from zoo_support import needs

NEEDS_AMX = pytest.mark.skipif(not has_amx(), reason="this processor has no AMX tiles for bfloat16")
FORCED = ["direct", *(pytest.param(name, marks=NEEDS_AMX) if needs_amx(name) else name for name in WINOGRAD)]


class Small(nn.Module):
    """Each kind of epilogue, a strided, a grouped and a padded-same convolution, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU6())
        self.a = nn.Sequential(nn.Conv2d(20, 20, 3, padding=1), nn.BatchNorm2d(20), nn.SiLU(inplace=True))
        self.b = nn.Sequential(nn.Conv2d(20, 20, 3, padding="same", bias=False), nn.BatchNorm2d(20))
        self.c = nn.Sequential(nn.Conv2d(20, 20, 3, padding=1, groups=4), nn.Hardswish())
        self.down = nn.Conv2d(20, 12, 3, stride=2)
        self.score, self.norm = nn.Linear(12, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        y = F.relu_(self.b(self.a(x)) + x)
        y = F.silu(y + self.c(y))
        z = F.hardtanh(self.down(y), 0, 6)
        return {"image": z, "score": self.norm(self.score(z.mean((2, 3))))}


def assert_same(fast: nn.Module, model: nn.Module, *inputs: Tensor, tolerance: float = 1e-4) -> None:
    with torch.no_grad():
        expected, found = model(*inputs), fast(*inputs)
    assert type(found) is type(expected)
    for a, b in zip(tensors_in(found), tensors_in(expected), strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return randomise(Small())


@pytest.mark.parametrize("choice", FORCED)
def test_each_choice(small: nn.Module, choice: str) -> None:
    fast = tn.lower(small, torch.rand(2, 3, 13, 11), choice=choice)
    tolerance = 2e-2 if choice.endswith("half") else 1e-4
    for batch in (1, 2, 5):
        assert_same(fast, small, torch.rand(batch, 3, 13, 11), tolerance=tolerance)
    layers = {layer.name: layer for layer in fast.report.layers}
    dense = {"stem.0", "a.0", "b.0"}
    assert layers.keys() == dense | {"c.0", "down"}
    for name, layer in layers.items():
        assert layer.choice == (choice if name in dense else "direct")
        assert layer.times == {}
    assert fast.report.folded == 4
    # What follows an activation is not fused; everything else is.
    assert fast.report.other == {"add": 1, "silu": 1, "mean": 1, "linear": 1}


def test_the_plain_choice_and_the_kinds(small: nn.Module) -> None:
    fast = tn.lower(small, torch.rand(2, 3, 13, 11), choice="torch")
    assert_same(fast, small, torch.rand(3, 3, 13, 11), tolerance=1e-6)
    assert [layer.kind for layer in fast.report.layers] == [
        "3x3 3 -> 20, relu6",
        "3x3 20 -> 20, silu",
        "3x3 20 -> 20 + residual, relu",
        "3x3 20 -> 20 groups 4, hardswish",
        "3x3 20 -> 12 /2, relu6",
    ]
    assert "c.0" in str(fast.report)
    assert json.loads(json.dumps(fast.report.to_dict()))["threads"] == torch.get_num_threads()


def test_measured(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 3, 13, 11)
    first = tn.lower(small, x)
    assert_same(first, small, torch.rand(2, 3, 13, 11))
    for layer in first.report.layers:
        products = {"gemm", "amx"} if has_amx() else {"gemm"}
        offered = {"torch", "direct"} | (set() if layer.name == "c.0" else products)
        winograd = {"F2", "F4", "F6", "F2 amx", "F4 amx"} if has_amx() else {"F2", "F4", "F6"}
        offered |= winograd if layer.name in ("stem.0", "a.0", "b.0") else set()
        assert set(layer.times) == offered
        assert layer.choice == choose.ranking(layer.times)[0]

    def never(*args: Any) -> Any:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("tersenet.lowering.assign.layers_timed", never)
        assert tn.lower(small, x).report.layers == first.report.layers
        with pytest.raises(AssertionError, match="measured again"):
            tn.lower(small, x, threads=torch.get_num_threads() + 1)


@pytest.mark.parametrize(("choice", "others"), [("gemm", "direct"), pytest.param("amx", "amx", marks=NEEDS_AMX)])
def test_products_of_matrices(choice: str, others: str) -> None:
    """Layers of any size and stride, with every epilogue; grouped and dilated ones on AMX only."""
    model = nn.Sequential(
        nn.Conv2d(5, 20, 1), nn.BatchNorm2d(20), nn.ReLU6(), nn.Conv2d(20, 33, 1, stride=(1, 2), bias=False), nn.SiLU(),
        nn.Conv2d(33, 16, 1), nn.Hardswish(), nn.Conv2d(16, 16, 1, groups=2), nn.Conv2d(16, 4, 3, dilation=2),
        nn.Conv2d(4, 4, (5, 2), stride=2, padding=(3, 1)),
    )  # fmt: skip
    model = randomise(model)
    fast = tn.lower(model, torch.rand(1, 5, 12, 16), choice=choice)
    assert [layer.choice for layer in fast.report.layers] == [choice] * 3 + [others, others, choice]
    for batch in (1, 3):
        assert_same(fast, model, torch.randn(batch, 5, 12, 16))
    x = torch.randn(2, 5, 12, 16)
    with FlopCounterMode(display=False) as counter:  # who counts operators sees torch's
        assert_same(fast, model, x)
    assert counter.get_total_flops() > 0
    before = torch.get_num_threads()
    expected = fast(x)
    try:
        torch.set_num_threads(2)
        assert torch.equal(fast(x), expected)
    finally:
        torch.set_num_threads(before)


def test_a_winograd_kernel_has_to_be_clearly_faster() -> None:
    assert choose.ranking({"torch": 3.0, "direct": 1.0, "F4": 0.97}) == ["direct", "F4", "torch"]
    assert choose.ranking({"torch": 3.0, "direct": 1.0, "F4": 0.9, "F2": 0.92}) == ["F4", "F2", "direct", "torch"]
    assert choose.ranking({"direct": 1.0, "gemm": 0.99}) == ["gemm", "direct"]
    assert choose.ranking({"direct": 1.0, "amx": 0.97}) == ["direct", "amx"]


def test_amx_is_offered_where_it_is_only(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersenet.kernels.host._permitted", lambda: False)
    fast = tn.lower(small, torch.rand(1, 3, 13, 11))
    assert not any(needs_amx(name) for layer in fast.report.layers for name in layer.times)
    assert not any("AMX" in note for note in fast.report.notes)
    fast = tn.lower(small, torch.rand(1, 3, 13, 11), choice="amx")
    assert {layer.choice for layer in fast.report.layers} == {"direct"}
    assert any("no products on AMX's tiles" in note for note in fast.report.notes)


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 40))])
def test_random_networks(seed: int) -> None:
    inputs = 1 + seed % 2
    model = randomise(RandomNetwork(seed, depth=3, inputs=inputs), seed)
    images = [torch.randn(3, 3, 14, 14) for _ in range(inputs)]
    fast = tn.lower(model, tuple(x[:1] for x in images), choice=("F2", "F4", "F6")[seed % 3])
    assert_same(fast, model, *images, tolerance=1e-3)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet20", 32),
        pytest.param("vgg16_bn_cifar", 32, marks=pytest.mark.slow),
        pytest.param("resnet18", 64, marks=pytest.mark.slow),
        pytest.param("preresnet20", 32, marks=pytest.mark.slow),
    ],
)
def test_shipped_networks(name: str, size: int) -> None:
    model = randomise(build(name))
    fast = tn.lower(model, torch.randn(1, 3, size, size), choice="F4")
    assert_same(fast, model, torch.randn(2, 3, size, size))
    # Every batch norm and activation has gone into a convolution; `relu` is that of VGG's linear layers.
    left = {"linear", "reshape", "flatten", "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "mean", "relu"}
    # Pre-activation networks normalise sums, which no convolution alone makes.
    left |= {"slice", "pad", "constant_pad_nd"} | ({"batch_norm", "add"} if name.startswith("pre") else set())
    assert fast.report.other.keys() <= left


@pytest.mark.slow
@needs("torchvision")
def test_torchvision_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersenet.models.torchvision_cpu import ready

    monkeypatch.setattr("tersenet.lowering.timings.ROUNDS", (1, 2))
    for name in ("mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "densenet121", "shufflenet_v2_x0_5"):
        model = randomise(getattr(ready().models, name)(weights=None))
        fast = tn.lower(model, torch.randn(1, 3, 64, 64))
        assert_same(fast, model, torch.randn(2, 3, 64, 64), tolerance=1e-3)
        if name.startswith("mobilenet"):
            assert not fast.report.other.keys() & {"batch_norm", "relu6", "hardtanh"}


def test_the_original_stays_as_it_is(small: nn.Module) -> None:
    model = copy.deepcopy(small).train()
    model.stem.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    x = torch.rand(1, 3, 9, 9)
    fast = tn.lower(model, x, choice="F4")
    kept = fast(x)["score"].clone()
    assert modes == [module.training for module in model.modules()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert torch.equal(fast(x)["score"], kept)
    assert torch.equal(copy.deepcopy(fast)(x)["score"], kept)


class Frozen(nn.Module):
    """A batch norm that is a factor and a summand, a standardised weight, a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("shift", torch.rand(1, 8, 1, 1))
        self.border = nn.Parameter(torch.rand(8, 7, 7))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
        x = F.relu(F.conv2d(x, weight, self.conv.bias, padding=1) * self.scale + self.shift)
        y = self.twice(x)
        return self.twice(y) + self.border, y


def test_constants_are_computed_once() -> None:
    model = Frozen()
    fast = tn.lower(model, torch.rand(1, 4, 7, 7), choice="F2")
    assert_same(fast, model, torch.randn(2, 4, 7, 7))
    assert fast.report.folded == 2
    assert fast.report.other == {"add": 1}  # the border differs from pixel to pixel
    assert [layer.name for layer in fast.report.layers] == ["conv2d", "twice", "twice"]


def test_a_result_with_two_readers_is_not_fused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = self.conv(x)
            z = self.norm(y)
            return y, z, F.relu(z) + z

    model = randomise(Two())
    fast = tn.lower(model, torch.rand(1, 4, 7, 7), choice="F4")
    assert_same(fast, model, torch.randn(3, 4, 7, 7))
    assert fast.report.folded == 0
    assert fast.report.layers[0].kind == "3x3 4 -> 4"


def test_pruned_networks() -> None:
    overrides = {"steps.0.residual": "independent"}
    made = tn.compress("resnet8", {"steps": [{"method": "magnitude", "rate": 0.4}]}, overrides=overrides).model
    assert any(type(module).__name__ == "ChannelAdapter" for module in made.modules())
    model = randomise(made)
    shape = open_model("resnet8")[1]
    fast = tn.lower(model, torch.randn(1, *shape), choice="F4")
    assert_same(fast, model, torch.randn(2, *shape))


def test_without_kernels(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = host_of.Host("pdp11", frozenset(), "pdp", 1 << 16)
    monkeypatch.setattr("tersenet.lowering.layers.host", lambda: unknown)
    fast = tn.lower(small, torch.rand(1, 3, 9, 9), choice="F4")
    assert {layer.choice for layer in fast.report.layers} == {"direct"}
    assert "pdp11" in fast.report.notes[0]
    assert_same(fast, small, torch.rand(2, 3, 9, 9))


def test_without_onednn(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    fast = tn.lower(small, torch.rand(1, 3, 9, 9), choice="direct")
    assert {layer.choice for layer in fast.report.layers} == {"torch"}
    assert "oneDNN" in fast.report.notes[0]


def test_a_layer_with_too_large_an_error_falls_back(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersenet.lowering.assign._LAYER_ERROR", 2e-7)
    fast = tn.lower(small, torch.rand(1, 3, 24, 24), choice="F6")
    rejected = [layer for layer in fast.report.layers if layer.rejected]
    assert rejected
    assert all(layer.choice in ("direct", "torch") and "F6" in layer.rejected for layer in rejected)
    assert "(not F6: error)" in str(fast.report)


def test_a_network_with_too_large_an_error_is_refused(small: nn.Module) -> None:
    with pytest.raises(tn.GraphError, match=r"differs from the network by .* more than the tolerance of 1e-09"):
        tn.lower(small, torch.rand(1, 3, 9, 9), choice="F4", tolerance=1e-9)


def test_threads_are_honoured_and_given_back(small: nn.Module) -> None:
    before = torch.get_num_threads()
    assert tn.lower(small, torch.rand(1, 3, 9, 9), choice="F2", threads=2).report.threads == 2
    assert torch.get_num_threads() == before
    with pytest.raises(tn.GraphError):
        tn.lower(small, torch.rand(1, 3, 9, 9), threads=2, choice="F2", tolerance=0.0)
    assert torch.get_num_threads() == before


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x * self.count


class OneBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1, 9, 9)


CONV = nn.Conv2d(3, 4, 3)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: tn.lower(CONV, torch.rand(1, 3, 9, 9), choice="F5"), "unknown choice 'F5'; did you mean"),
    (lambda: tn.lower(CONV, torch.rand(1, 3, 9, 9), threads=0), r"threads \(=0\) must be at least 1"),
    (lambda: tn.lower(CONV, [[1.0]]), "an example is a tensor"),
    (lambda: tn.lower(copy.deepcopy(CONV).double(), torch.rand(1, 3, 9, 9)), "weight is torch.float64 on cpu"),
    (lambda: tn.lower(CONV, torch.rand(1, 3, 9, 9).half()), "input 0 of the example is torch.float16"),
    (lambda: tn.lower(copy.deepcopy(CONV).to("meta"), torch.rand(1, 3, 9, 9)), "float32 on meta"),
    (lambda: tn.lower(CONV, torch.rand(1, 5, 9, 9)), "torch.export does not take it"),
    (lambda: tn.lower(Branch(), torch.rand(1, 3, 9, 9)), "Branch can't be lowered, because torch.export"),
    (
        lambda: tn.lower(Counter(), torch.rand(1, 3, 9, 9)),
        "Counter can't be lowered: .* changes its own state",
    ),
    (lambda: tn.lower(OneBatch(), torch.rand(2, 3, 9, 9)), "does not run: .* one batch size only"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_cannot_be_lowered(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(tn.TersenetError, match=message):
        call()


def test_what_a_lowered_network_refuses() -> None:
    fast = tn.lower(CONV, torch.rand(1, 3, 9, 9), choice="direct")
    for x in (torch.rand(1, 3, 9, 8), torch.rand(1, 3, 9, 9).double(), torch.rand(3, 9, 9)):
        with pytest.raises(tn.TersenetError, match="lower it again"):
            fast(x)
    with pytest.raises(tn.TersenetError, match="takes 1 inputs, not 2"):
        fast(torch.rand(1, 3, 9, 9), torch.rand(1, 3, 9, 9))
    with pytest.raises(tn.TersenetError, match="can't be trained"):
        fast.train()
    assert not fast.eval().training
    assert not fast(torch.rand(1, 3, 9, 9, requires_grad=True)).requires_grad
    strided = torch.rand(2, 9, 9, 6).permute(0, 3, 1, 2)[:, ::2]
    assert_same(fast, CONV, strided)
    assert fast(torch.rand(0, 3, 9, 9)).shape == (0, 4, 7, 7)


class InPlace(nn.Module):
    """Changes in place that a view, a second name or the caller sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.conv(x)
        before = y * 2
        F.relu_(y)
        y += 1
        z = self.conv(y)
        half = z[:, :2]
        z.sigmoid_()
        half.mul_(3)
        return before + y, half, z


def test_changes_in_place() -> None:
    model = InPlace()
    fast = tn.lower(model, torch.rand(1, 4, 7, 7), choice="F2")
    assert_same(fast, model, torch.randn(2, 4, 7, 7))


class PowerInPlace(InPlace):
    """`pow.Scalar` is no `pow_.Scalar` out of place."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.conv(x).pow_(2)


def test_a_power_in_place() -> None:
    model = PowerInPlace()
    assert_same(tn.lower(model, torch.rand(1, 4, 7, 7), choice="F2"), model, torch.randn(2, 4, 7, 7))


@pytest.mark.slow
def test_the_page() -> None:
    page = Path(__file__).parents[2] / "docs" / "lower.md"
    exec(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)[0], {})


def test_a_layer_called_again_is_checked_when_anything_is_different() -> None:
    """The second call of one size goes past torch's operator, and must not take what only looks the same."""
    torch.manual_seed(0)
    layer = Layer("conv", torch.randn(8, 6, 3, 3), torch.randn(8), (1, 1), (1, 1), (1, 1), 1, True, "relu")
    kernel = build_kernel(layer, "F2", (2, 6, 9, 9))
    x, r = (torch.randn(2, c, 9, 9).contiguous(memory_format=torch.channels_last) for c in (6, 8))
    expected = torch.relu(torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1) + r)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(kernel(x, r), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kernel(x.contiguous(), r.contiguous()), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kernel(x[:1], r[:1]), expected[:1], atol=1e-4, rtol=1e-4)
        assert kernel(x[:0], r[:0]).shape == (0, 8, 9, 9)
        for wrong in (x.double(), x[:, :5]):
            with pytest.raises(tn.TersenetError):
                kernel(wrong, r)
        for wrong in (r.double(), r[:1], r[..., 1:]):
            with pytest.raises(tn.TersenetError):
                kernel(x, wrong)
        assert kernel(x.to("meta"), r.to("meta")).is_meta
        with FlopCounterMode(display=False):
            torch.testing.assert_close(kernel(x, r), expected, atol=1e-4, rtol=1e-4)
