"""The sparse kernels against the layer that they run, in float64: masks of every kind, sizes, widths, epilogues."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_support import ACTIVATIONS, ERRORS, ISAS, relative_error, same
from torch import Tensor

from tersenet.errors import TersenetError
from tersenet.kernels.host import host
from tersenet.kernels.operator import winograd_conv2d
from tersenet.kernels.pack import pack, pack_domain
from tersenet.kernels.pack_sparse import SparsePacked, pack_sparse
from tersenet.kernels.sparse_operator import sparse_winograd_conv2d
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings

POINTS = ["reference", "lavin"]
KEPT = ["sparse", "scattered"]


def layer_of(
    seed: int,
    c: int,
    k: int,
    m: int = 2,
    relu: bool = True,
    points: str = "reference",
    padding: tuple[int, int] = (1, 1),
) -> WinogradReLUConv2d:
    """In float64, with weights as large as those of a convolution."""
    torch.manual_seed(seed)
    conv = torch.nn.Conv2d(c, k, 3, padding=padding, dtype=torch.float64)
    return WinogradReLUConv2d.from_conv(conv, WinogradReLUSettings(tile=m, points=points, relu=relu)).eval()  # type: ignore[arg-type]


def pruned(layer: WinogradReLUConv2d, density: float, block: int, seed: int) -> None:
    """Keep so many blocks of `block` output channels by one input channel, in each tap."""
    torch.manual_seed(seed)
    taps, c, k = layer.weight.shape
    keep = torch.rand(taps, c, -(-k // block)) < density
    with torch.no_grad():
        layer.weight.mul_(keep.repeat_interleave(block, 2)[..., :k])


def packed_of(layer: WinogradReLUConv2d, isa: str | None = None, kept: str = "sparse") -> SparsePacked:
    points = layer.settings.points
    assert isinstance(points, str)
    relu = layer.settings.relu
    bias = None if layer.bias is None else layer.bias.float()
    return pack_sparse(layer.weight.float(), bias, layer.settings.tile, isa, points, relu, kept)


@settings(max_examples=30, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    kept=st.sampled_from(KEPT),
    m=st.sampled_from([2, 4]),
    points=st.sampled_from(POINTS),
    relu=st.booleans(),
    n=st.integers(1, 3),
    c=st.integers(1, 40),
    h=st.integers(1, 20),
    w=st.integers(1, 20),
    k=st.integers(1, 70),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    residual=st.booleans(),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    block=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 2**32),
)
@example("avx512", "sparse", 4, "reference", True, 1, 300, 14, 14, 40, (1, 1), "relu", True, 0.3, 16, 0)
@example("avx512", "scattered", 4, "reference", True, 1, 300, 33, 31, 40, (1, 1), "relu", True, 0.3, 1, 0)
@example("avx512", "sparse", 2, "reference", True, 2, 16, 60, 60, 32, (1, 1), "none", False, 0.2, 16, 0)
def test_equals_the_layer(
    isa: str, kept: str, m: int, points: str, relu: bool, n: int, c: int, h: int, w: int, k: int,
    padding: tuple[int, int], activation: str, residual: bool, density: float, block: int, seed: int,
) -> None:  # fmt: skip
    h, w = max(h, 3 - 2 * padding[0]), max(w, 3 - 2 * padding[1])
    layer = layer_of(seed % 2**31, c, k, m, relu, points, padding)
    pruned(layer, density, block, seed % 2**31)
    x = torch.randn(n, c, h, w, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        added = torch.randn_like(expected) if residual else None
        expected = ACTIVATIONS[activation](expected if added is None else expected + added)
        packed = packed_of(layer, isa if isa in ISAS else None, kept)
        y = sparse_winograd_conv2d(x.float(), packed, padding, None if added is None else added.float(), activation)
    assert y.shape == expected.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    scale = float(expected.norm()) + math.sqrt(expected.numel())
    assert float((y - expected).norm()) <= 4 * ERRORS[m] * scale


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("isa", ISAS)
def test_a_dense_weight_gives_what_the_dense_kernel_gives(isa: str, kept: str) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(24, 48, 3, padding=1)
    layer = WinogradReLUConv2d.from_conv(conv, WinogradReLUSettings(tile=4, points="lavin", relu=False))
    x = torch.randn(2, 24, 19, 23)
    with torch.no_grad():
        dense = winograd_conv2d(x, pack(conv.weight, conv.bias, 4, isa), (1, 1))
        sparse = sparse_winograd_conv2d(x, packed_of(layer, isa, kept), (1, 1))
    assert relative_error(sparse, dense) < 1e-5


@pytest.mark.parametrize("side", [10, 30])
@pytest.mark.parametrize("kept", KEPT)
def test_threads_change_nothing(kept: str, side: int) -> None:
    layer = layer_of(1, 33, 70, 4)
    pruned(layer, 0.3, 16, 1)
    x, packed = torch.randn(2, 33, side, side), packed_of(layer, kept=kept)
    before = torch.get_num_threads()
    try:
        found: list[Tensor] = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(sparse_winograd_conv2d(x, packed, (1, 1)))
    finally:
        torch.set_num_threads(before)
    assert all(same(found[0], other) for other in found)


def test_only_what_is_left_is_kept() -> None:
    layer = layer_of(2, 32, 64, 2)
    pruned(layer, 0.25, 16, 2)
    packed = packed_of(layer)
    width = packed.algorithm.isa.width
    blocks = (layer.weight.view(16, 32, -1, width) != 0).any(3)
    assert len(packed.list) == int(blocks.sum())
    assert packed.density == pytest.approx(float(blocks.double().mean()))
    assert packed.weight.shape == (len(packed.list), width)


def test_single_weights_are_kept() -> None:
    layer = layer_of(2, 150, 20, 2)
    pruned(layer, 0.25, 1, 2)
    packed = packed_of(layer, kept="scattered")
    assert len(packed.list) == int((layer.weight != 0).sum())
    assert packed.density == pytest.approx(float((layer.weight != 0).double().mean()))
    assert sorted(packed.weight.tolist()) == sorted(layer.weight[layer.weight != 0].float().tolist())


@pytest.mark.parametrize("kept", KEPT)
def test_what_is_not_a_number_stays_so(kept: str) -> None:
    layer = layer_of(3, 4, 20, 2)
    x = torch.randn(1, 4, 8, 8)
    x[0, 1, 4, 4] = math.nan
    y = sparse_winograd_conv2d(x, packed_of(layer, kept=kept), (1, 1))
    assert bool(y.isnan().any())
    assert not bool(y.isnan().all())


def test_torch_compile_and_export_take_it() -> None:
    packed = packed_of(layer_of(4, 5, 9))

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sparse_winograd_conv2d(x, packed, (1, 1), activation="relu") * 2

    x = torch.randn(2, 5, 9, 9)
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(Net(), (x,), dynamic_shapes=shapes, strict=False).module()
    again = torch.randn(3, 5, 9, 9)
    torch.testing.assert_close(program(again), Net()(again))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 7, 8, 8)}, "must have the 6 channels"),
        ({"x": torch.randn(1, 6, 8, 8, dtype=torch.float64)}, "must be float32"),
        ({"padding": (-1, 0)}, "has no room"),
        ({"activation": "gelu"}, "unknown activation"),
        ({"residual": torch.randn(1, 9, 8, 7)}, "residual"),
        ({"residual": torch.randn(1, 9, 8, 8).double()}, "residual"),
    ],
)
def test_bad_arguments(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.randn(1, 6, 8, 8),
        "packed": packed_of(layer_of(5, 6, 9)),
        "padding": (1, 1),
    }
    with pytest.raises(TersenetError, match=message):
        sparse_winograd_conv2d(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("wrong", ["list", "starts", "weight", "bias", "channel"])
def test_lists_that_would_lead_astray_are_refused(wrong: str, kept: str) -> None:
    good = packed_of(layer_of(6, 6, 9), kept=kept)
    tables = {name: getattr(good, name).clone() for name in ("weight", "list", "starts", "bias")}
    if wrong == "channel":
        tables["list"][3] = 6 if kept == "sparse" else 1
    elif wrong == "starts":
        tables["starts"][2] = 10**6
    else:
        tables[wrong] = tables[wrong][:-1]
    packed = SparsePacked(good.algorithm, **tables, in_channels=6, out_channels=9)
    with pytest.raises(TersenetError, match="pack"):
        sparse_winograd_conv2d(torch.randn(1, 6, 8, 8), packed, (1, 1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["float", "half"])
def test_a_dense_kernel_takes_a_weight_of_the_domain(isa: str, kind: str) -> None:
    if kind == "half" and not host().isa(isa).has_half:
        return
    layer = layer_of(7, 24, 40, 4, points="balanced")
    pruned(layer, 0.5, 4, 1)
    x = torch.randn(2, 24, 19, 13, dtype=torch.float64)
    bias = None if layer.bias is None else layer.bias.float()
    packed = pack_domain(layer.weight.float(), bias, 4, isa, "balanced", True, kind)
    with torch.no_grad():
        expected = layer(x).relu()
        y = winograd_conv2d(x.float(), packed, (1, 1), activation="relu")
    assert relative_error(y, expected) < (1e-5 if kind == "float" else 2e-3)


def test_a_transformed_filter_is_packed_as_pack_does_it() -> None:
    conv = torch.nn.Conv2d(7, 40, 3)
    layer = WinogradReLUConv2d.from_conv(conv, WinogradReLUSettings(tile=2, points="lavin", relu=False))
    one, other = pack(conv.weight, conv.bias, 2), pack_domain(layer.weight, conv.bias, 2)
    torch.testing.assert_close(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)
    assert one.algorithm == other.algorithm


def test_bad_weights() -> None:
    with pytest.raises(TersenetError, match=r"of shape \(16, C_in, C_out\) for F\(2x2, 3x3\)"):
        pack_domain(torch.randn(36, 3, 4), m=2)
    with pytest.raises(TersenetError, match=r"of shape \(36, C_in, C_out\) for F\(4x4, 3x3\)"):
        pack_sparse(torch.randn(16, 3, 4), m=4)
    with pytest.raises(TersenetError, match="one value for each of 4 output channels"):
        pack_sparse(torch.randn(16, 3, 4), torch.zeros(3), m=2)
    with pytest.raises(TersenetError, match="must be one of"):
        pack_sparse(torch.randn(25, 3, 4), m=3)
    assert host().isas()
