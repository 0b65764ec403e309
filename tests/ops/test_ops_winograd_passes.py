"""Generated passes between images and taps against torch's operators, and the layer that uses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tersenet.errors import TersenetError
from tersenet.kernels.host import Isa, host
from tersenet.nn.winograd_relu import WinogradReLUConv2d
from tersenet.nn.winograd_relu_settings import WinogradReLUSettings
from tersenet.ops import winograd_passes
from tersenet.ops.cook_toom import cook_toom
from tersenet.ops.winograd import kronecker
from tersenet.ops.winograd_passes import GeneratedPasses, TorchPasses, passes_for
from tersenet.ops.winograd_tiles import Geometry


def _isas() -> list[Isa]:
    try:
        return list(host().isas())
    except TersenetError:
        return []


ISAS = _isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="no generated kernels for this processor")


def both(isa: Isa, geometry: Geometry, points: str) -> tuple[GeneratedPasses, TorchPasses]:
    """The generated ones in float32, and torch's in float64."""
    exact = cook_toom(geometry.tile, geometry.taps, points)
    at, bt = (torch.tensor([[float(x) for x in row] for row in m], dtype=torch.float64) for m in (exact.at, exact.bt))
    return GeneratedPasses(geometry, exact, isa), TorchPasses(geometry, kronecker(at), kronecker(bt))


def close(made: Tensor, reference: Tensor, error: float = 2e-6) -> None:
    assert made.dtype == torch.float32
    assert made.shape == reference.shape
    size = float(reference.abs().max()) if reference.numel() else 1.0
    assert not made.numel() or float((made - reference).abs().max()) <= error * size + 1e-30


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ISAS or [None]),
    tile=st.sampled_from([2, 3, 4, 6]),
    kernel=st.sampled_from([2, 3, 5]),
    size=st.tuples(st.integers(1, 3), st.sampled_from([1, 3, 8, 16, 21, 33]), st.integers(1, 14), st.integers(1, 14)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    nhwc=st.booleans(),
)
def test_any_shape(
    isa: Isa, tile: int, kernel: int, size: tuple[int, ...], padding: tuple[int, ...], nhwc: bool
) -> None:
    top, bottom, left, right = padding
    geometry = Geometry(tile, (kernel, kernel), padding=((top, bottom), (left, right)))
    n, c, h, w = size
    if h + top + bottom < kernel or w + left + right < kernel:
        return
    made, reference = both(isa, geometry, "balanced")
    order = torch.channels_last if nhwc else torch.contiguous_format
    x = torch.randn(size).contiguous(memory_format=order)
    for relu in (False, True):
        close(made.taps(x, relu), reference.taps(x.double(), relu))
    gate = made.taps(x, True)
    k = c + 2
    products = made.product(gate, torch.randn(gate.shape[0], c, k))
    y = made.image(products, (n, h, w), nhwc)
    # Large terms cancel in A^T M A.
    close(y, reference.image(products.double(), (n, h, w), nhwc), 1e-4)
    dy = torch.randn(y.shape).contiguous(memory_format=order)
    d_products = made.product_gradient(dy, h, w)
    close(d_products, reference.product_gradient(dy.double(), h, w))
    d_taps = made.product(d_products, torch.randn(gate.shape[0], k, c))
    for signs in (None, gate):
        of_signs = None if signs is None else signs.double()
        close(made.input_gradient(d_taps, signs, x.shape), reference.input_gradient(d_taps.double(), of_signs, x.shape))


@pytest.mark.parametrize(("relu", "share"), [(True, 0.0), (True, 0.3), (True, 1.0), (False, 0.0)])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("cached", [2**14, 2**30])
@pytest.mark.parametrize("nhwc", [False, True])
def test_the_layer_and_its_gradients(
    relu: bool, share: float, tile: int, nhwc: bool, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GeneratedPasses, "cached", cached)  # several parts, or one
    torch.manual_seed(0)
    layer = WinogradReLUConv2d(20, 24, 3, 1, True, WinogradReLUSettings(tile=tile, relu=relu))
    layer.spatial_share = share
    order = torch.channels_last if nhwc else torch.contiguous_format
    x = torch.randn(5, 20, 15, 13).contiguous(memory_format=order)
    dy = torch.randn(5, 24, 15, 13)
    found: list[list[Tensor]] = []
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype)
        layer.zero_grad()
        images = x.to(dtype, copy=True, memory_format=order).requires_grad_()
        y = layer(images)
        assert y.is_contiguous(memory_format=order)
        assert not y._is_view()  # in-place operators would be refused
        y.backward(dy.to(dtype))
        assert images.grad is not None
        assert layer.weight.grad is not None
        assert layer.bias is not None
        assert layer.bias.grad is not None
        found.append([y.detach(), images.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-4 if tile == 4 else 1e-5)


def test_where_generated_code_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = WinogradReLUConv2d(32, 32)
    aa, bb = (kronecker(matrix) for matrix in (layer.transforms.at, layer.transforms.bt))

    def chosen(x: Tensor, exact: Any = layer.transforms.exact) -> bool:
        return isinstance(passes_for(x, layer.weight, layer.geometry, aa, bb, exact), GeneratedPasses)

    x = torch.zeros(4, 32, 12, 12)
    assert chosen(x)
    assert not chosen(x, None)
    assert not chosen(x[:1, :, :2, :2])
    with FlopCounterMode(display=False) as counter:
        assert not chosen(x)
        layer(x)
    assert counter.get_total_flops() > 0
    assert not isinstance(
        passes_for(x, layer.weight, layer.geometry, aa, bb.double(), layer.transforms.exact), GeneratedPasses
    )
    monkeypatch.setattr(winograd_passes, "best_isa", lambda: None)
    assert not chosen(x)


def test_threads_give_the_same_and_what_is_no_number_stays_so() -> None:
    layer = WinogradReLUConv2d(16, 16)
    x = torch.randn(6, 16, 9, 9)
    x[0, 0, 4, 4] = torch.nan
    before = torch.get_num_threads()
    found: list[tuple[Tensor, Tensor]] = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            images = x.clone().requires_grad_()
            y = layer(images)
            y.sum().backward()
            assert images.grad is not None
            found.append((y.detach(), images.grad))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert found[0][0][0, :, 4, 4].isnan().all()
    assert not found[0][0][1:].isnan().any()
