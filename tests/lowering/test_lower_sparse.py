"""Networks with weights in the Winograd domain, lowered: the same outputs by every kernel, for any mask and size."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import tersenet as tn
from graph_support import randomise
from tersenet.graph.model import ModelGraph
from tersenet.kernels import host as host_of
from tersenet.lowering import choose
from tersenet.lowering.assign import distance
from tersenet.lowering.layers import SPARSE, DomainLayer, has_amx
from tersenet.lowering.modules import build, reference
from tersenet.lowering.on_gpu import fits as fits_gpu
from tersenet.methods.base import Context
from tersenet.methods.sparse_winograd import SparseWinograd
from tersenet.models.build import build as network
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.nn.winograd_relu_operator import OPERATOR, as_operator
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings
from tersenet.ops.winograd_tiles import Geometry

BLOCKS = (1, 4, 16)


def domain(inputs: int, outputs: int, density: float = 0.3, block: int = 16, **given: Any) -> WinogradReLUConv2d:
    """A layer with a mask; with density 1 without."""
    padding, bias, size = given.pop("padding", 1), given.pop("bias", True), given.pop("kernel_size", 3)
    layer = WinogradReLUConv2d(inputs, outputs, size, padding, bias, WinogradReLUSettings(**given))
    layer.reset("unit")
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    if density < 1:
        layer.make_sparse()
        kept = torch.rand(layer.weight.shape[0], inputs, -(-outputs // block)) < density
        layer.set_mask(kept.repeat_interleave(block, 2)[..., :outputs])
        # Momentum may leave something there: it never counts.
        layer.weight.data.masked_fill_(~layer.mask, 7.0)
    return layer


def as_layer(module: WinogradReLUConv2d, residual: bool, activation: str) -> DomainLayer:
    at, _, bt = module.transforms(torch.float32)
    weight = module.weight.detach() if module.mask is None else module.weight.detach() * module.mask
    bias = None if module.bias is None else module.bias.detach()
    assert isinstance(module.settings.points, str)
    what = (module.settings.points, module.settings.relu, module.geometry)
    threshold = module.activation.threshold
    return DomainLayer("layer", weight, bias, at, bt, *what, residual, activation, threshold=threshold)


@settings(max_examples=20, deadline=None)
@given(
    # Each pair takes a second of compilation.
    form=st.sampled_from([(2, True), (4, False)]),
    size=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 20)),
    outputs=st.integers(1, 70),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bias=st.booleans(),
    residual=st.booleans(),
    activation=st.sampled_from(["none", "relu", "relu6", "silu", "hardswish"]),
    density=st.sampled_from([0.01, 0.25, 0.7, 1.0]),
    block=st.sampled_from(BLOCKS),
    seed=st.integers(0, 2**31),
)
def test_each_kernel_of_a_layer(
    form: tuple[int, bool], size: tuple[int, int, int, int], outputs: int, padding: tuple[int, int], bias: bool,
    residual: bool, activation: str, density: float, block: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    m, relu = form
    n, c, h, w = size
    h, w = max(h, 3 - 2 * padding[0]), max(w, 3 - 2 * padding[1])
    sides = tuple((side, side) for side in padding)
    module = domain(c, outputs, density, block, tile=m, relu=relu, padding=sides, bias=bias)
    layer = as_layer(module, residual, activation)
    x = torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = module.eval()(x)
        added = [torch.randn_like(y)] if residual else []
        expected = {"none": lambda y: y, "relu6": F.relu6}.get(activation) or getattr(F, activation)
        expected = expected(y + added[0] if residual else y)
        assert tuple(y.shape) == layer.output_size(tuple(x.shape))
        names = [name for name in ("torch", f"F{m}", *SPARSE) if layer.fits(name)]
        assert len(names) == (4 if layer.density < 1 else 2)
        assert layer.fits(f"F{m} half")
        for name in names:
            kernel = build(layer, name, tuple(x.shape))
            for _ in range(2):  # the second call goes past torch's operator
                limit = 1e-5 if m == 2 else 1e-4
                found = kernel(x, *added)
                assert float((found - expected).norm()) <= limit * (float(y.norm()) + y.numel() ** 0.5)
        assert not any(layer.fits(name) for name in ("direct", "F6", f"F{6 - m}", f"F{6 - m} half"))


@pytest.mark.parametrize("m", [2, 4])
def test_a_threshold(m: int) -> None:
    torch.manual_seed(0)
    module = domain(20, 40, 0.3, tile=m, relu=False, threshold=0.5).eval()
    layer = as_layer(module, False, "relu")
    x = torch.randn(2, 20, 13, 9).relu().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = module(x).relu()
        without = build(replace(layer, threshold=0.0), "torch", tuple(x.shape))(x)
        assert float((without - expected).norm()) > 1e-3 * float(expected.norm())
        for name in ("torch", f"F{m}", *SPARSE, *([f"F{m} amx"] if has_amx() else [])):
            kernel = build(layer, name, tuple(x.shape))
            for _ in range(2):
                assert float((kernel(x) - expected).norm()) <= 1e-4 * float(expected.norm()), name
    assert layer.kind.startswith(f"F({m}, 3) cut 0.5 20 -> 40")
    assert layer.shape != replace(layer, threshold=0.25).shape
    assert not fits_gpu(layer, f"F{m}")
    assert fits_gpu(replace(layer, threshold=0.0), f"F{m}")


class Net(nn.Module):
    """A stem, then layers of the Winograd domain: with a norm and an activation, a shortcut, a factor, two readers."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.a, self.norm = domain(20, 24, bias=False, **given), nn.BatchNorm2d(24)
        self.b, self.norm_b = domain(24, 20, block=1, **given), nn.BatchNorm2d(20)
        self.c = domain(20, 20, density=1.0, **given)
        self.register_buffer("factor", torch.rand(1, 20, 1, 1) + 0.5)
        self.d = domain(20, 9, padding=0, **given)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = F.relu6(self.norm(self.a(x)))
        x = F.relu(x + self.norm_b(self.b(y)))
        x = self.c(x) * self.factor
        y = self.d(x)
        return y, F.relu(y) + y


def assert_same(fast: nn.Module, model: nn.Module, x: Tensor, tolerance: float = 1e-4) -> None:
    with torch.no_grad():
        for found, expected in zip(fast(x), model(x), strict=True):
            assert found.shape == expected.shape
            assert distance(found, expected) <= tolerance


@pytest.mark.parametrize(
    ("tile", "relu", "choice"),
    [(2, True, "sparse"), (4, False, "scattered"), (4, False, "F4"), (2, True, "F2 half")],
)
def test_networks(tile: int, relu: bool, choice: str) -> None:
    torch.manual_seed(tile)
    model = randomise(Net(tile=tile, relu=relu))
    fast = tn.lower(model, torch.rand(2, 3, 13, 11), choice=choice)
    for batch in (1, 2, 5):
        assert_same(fast, model, torch.rand(batch, 3, 13, 11), 2e-2 if choice.endswith("half") else 1e-4)
    layers = {layer.name: layer for layer in fast.report.layers}
    inside = " relu" if relu else ""
    assert [layers[name].kind for name in "abcd"] == [
        f"F({tile}, 3){inside} 20 -> 24, relu6",
        f"F({tile}, 3){inside} 24 -> 20 + residual, relu",
        f"F({tile}, 3){inside} 20 -> 20",
        f"F({tile}, 3){inside} 20 -> 9",
    ]
    # A dense weight has no sparse kernel.
    of_dense = "torch" if choice in SPARSE else choice
    assert [layers[name].choice for name in "abcd"] == [choice, choice, of_dense, choice]
    for name in "abd":
        module = model.get_submodule(name)
        assert isinstance(module, WinogradReLUConv2d)
        assert layers[name].density == pytest.approx(module.density)
        assert f"{module.density:.3f}" in str(fast.report)
    assert layers["c"].density == 1
    assert layers["stem"].density is None
    assert fast.report.folded == 3
    assert fast.report.other == {"relu": 1, "add": 1}


def test_a_choice_of_another_tile_leaves_torch() -> None:
    model = randomise(Net(tile=2))
    fast = tn.lower(model, torch.rand(1, 3, 9, 9), choice="F4")
    assert [layer.choice for layer in fast.report.layers] == ["F4", *["torch"] * 4]
    assert_same(fast, model, torch.rand(2, 3, 9, 9))


@pytest.mark.parametrize("choice", SPARSE)
def test_threads_change_nothing(choice: str) -> None:
    fast = tn.lower(randomise(Net(tile=4, relu=False)), torch.rand(1, 3, 30, 30), choice=choice)
    x, before = torch.rand(3, 3, 30, 30), torch.get_num_threads()
    try:
        found: list[Tensor] = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(fast(x)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(domain(8, 32, 0.25, tile=4, relu=False)), torch.rand(1, 8, 9, 9)
    first = tn.lower(model, x).report.layers
    assert set(first[0].times) == {"F4", "sparse", "scattered"} | ({"F4 amx"} if has_amx() else set())
    assert first[0].choice == choose.ranking(first[0].times)[0]

    def never(*args: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("tersenet.lowering.assign.layers_timed", never)
    assert tn.lower(model, x).report.layers == first
    # How much is pruned decides about times.
    with pytest.raises(AssertionError, match="measured again"):
        tn.lower(nn.Sequential(domain(8, 32, 0.6, tile=4, relu=False)), x)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"kernel_size": 5, "points": "balanced"}, r"m in \(2, 4, 6\), not F\(2, 5\)"),
        ({"tile": 3, "points": "balanced"}, r"not F\(3, 3\)"),
        ({"padding": ((1, 0), (1, 1))}, r"the padding \(\(1, 0\), \(1, 1\)\) differs"),
        ({"points": ("0", "1", "-1")}, "points without a name"),
    ],
)
def test_where_there_are_no_kernels(given: dict[str, Any], reason: str) -> None:
    model = nn.Sequential(domain(3, 8, **given), nn.ReLU())
    for choice in (None, "sparse"):
        fast = tn.lower(model, torch.rand(1, 3, 9, 10), choice=choice)
        assert [layer.choice for layer in fast.report.layers] == ["torch"]
        assert fast.report.layers[0].kind.endswith(", relu")
        (note,) = fast.report.notes
        assert re.match(rf"no generated kernels for 0: .*{reason}", note)
        x = torch.rand(3, 3, 9, 10)
        torch.testing.assert_close(fast(x), model(x).detach())


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = host_of.Host("pdp11", frozenset(), "pdp", 1 << 16)
    monkeypatch.setattr("tersenet.lowering.layers.host", lambda: unknown)
    model = randomise(Net())
    fast = tn.lower(model, torch.rand(1, 3, 9, 9), choice="sparse")
    assert {layer.choice for layer in fast.report.layers} == {"direct", "torch"}
    assert "pdp11" in fast.report.notes[0]
    assert_same(fast, model, torch.rand(2, 3, 9, 9))


def test_a_relu_that_has_not_moved_yet_stays_torchs() -> None:
    model = nn.Sequential(domain(3, 8))
    layer = model[0]
    assert isinstance(layer, WinogradReLUConv2d)
    layer.spatial_share = 0.5
    fast = tn.lower(model, torch.rand(1, 3, 9, 9))
    assert fast.report.layers == ()
    x = torch.rand(2, 3, 9, 9)
    torch.testing.assert_close(fast(x), model(x).detach())


@pytest.mark.parametrize("name", ["resnet8", pytest.param("vgg16_bn_cifar", marks=pytest.mark.slow)])
def test_converted_networks(name: str) -> None:
    model = randomise(network(name))
    graph = ModelGraph(model, (torch.rand(2, 3, 32, 32),))
    method = SparseWinograd(fit={"epochs": 1}, density=0.25, pattern="16x1", tile=4, others="native")  # pyright: ignore
    method.preview(graph, Context(torch.device("cpu"), 0))
    converted = graph.model.eval()
    fast = tn.lower(converted, torch.randn(1, 3, 32, 32), choice="sparse")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert distance(fast(x), converted(x)) < 1e-3
    sparse = {layer.name for layer in fast.report.layers if layer.choice == "sparse"}
    assert sparse == {n for n, m in converted.named_modules() if isinstance(m, WinogradReLUConv2d)}
    assert len(sparse) >= 4
    assert not fast.report.other.keys() & {"batch_norm", "winograd_relu_conv2d"}


def test_the_operator() -> None:
    """Schema and fake kernel, as torch.library.opcheck tests them; nothing but lowering makes the layer one of it."""
    torch.manual_seed(0)
    layer = domain(3, 5, block=1, padding=((0, 1), (2, 1)))
    at, _, bt = layer.transforms()
    for x in (torch.rand(2, 3, 7, 8), torch.rand(2, 3, 7, 8).contiguous(memory_format=torch.channels_last)):
        weight = layer.weight.detach()
        arguments = (x, weight, layer.bias.detach(), layer.mask, at, bt, "reference", 2, True, [0, 1, 2, 1], 0.0)  # pyright: ignore
        torch.library.opcheck(OPERATOR, arguments, test_utils=("test_schema", "test_faketensor"))
        assert torch.equal(OPERATOR(*arguments), layer(x))
    x = torch.rand(2, 3, 7, 8)
    for inside in (False, True):
        with as_operator() if inside else torch.no_grad():
            program = torch.export.export(layer.eval(), (x,), strict=False)
        assert any(node.target is OPERATOR for node in program.graph.nodes) == inside


def test_the_reference_is_the_layer() -> None:
    layer = domain(4, 6, tile=4)
    x = torch.rand(2, 4, 9, 9)
    with torch.no_grad():
        assert torch.equal(reference(as_layer(layer, False, "none"))(x), layer(x))
    assert as_layer(layer, False, "none").geometry == Geometry(4, (3, 3), padding=((1, 1), (1, 1)))


def test_blocks_are_counted_for_any_vector() -> None:
    weight = torch.zeros(16, 2, 20)
    weight[0, 0, 17] = weight[3, 1, 2] = 1
    at, bt = torch.zeros(2, 4), torch.zeros(4, 4)
    layer = DomainLayer("", weight, None, at, bt, "reference", True, Geometry(2, (3, 3)), False, "none")
    assert layer.density == 2 / weight.numel()
    assert layer.blocks(16) == pytest.approx(2 / (16 * 2 * 2))
    assert layer.blocks(4) == pytest.approx(2 / (16 * 2 * 5))
