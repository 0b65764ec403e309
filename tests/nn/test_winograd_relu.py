"""The layer with weight and ReLU in the Winograd domain: facts S1 to S5 of the specification, and its options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tersenet.errors import TersenetError
from tersenet.nn.masked import MaskedConv2d, masked_layers
from tersenet.nn.skip_relu import skip_relu
from tersenet.nn.winograd_relu import WinogradReLUConv2d, hindrance
from tersenet.nn.winograd_relu_settings import Init, WinogradReLUSettings
from tersenet.ops.winograd import kronecker
from tersenet.ops.winograd_passes import Passes
from tersenet.ops.winograd_relu import Activation

LINEAR = WinogradReLUSettings(relu=False)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(channels: int = 3, outputs: int = 4, padding: Any = 1, **given: Any) -> WinogradReLUConv2d:
    torch.manual_seed(1)
    made = WinogradReLUConv2d(channels, outputs, 3, padding, True, WinogradReLUSettings(**given), dtype=torch.float64)
    with torch.no_grad():
        made.weight.normal_()
        assert made.bias is not None
        made.bias.normal_()
    return made


@settings(max_examples=12, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    padding=st.sampled_from([0, 1, 2, "same"]),
    tile=st.sampled_from([2, 3, 4]),
    bias=st.booleans(),
)
def test_fact_s1_from_a_convolution_it_is_that_convolution(
    size: tuple[int, int], padding: int | str, tile: int, bias: bool
) -> None:
    conv = nn.Conv2d(3, 5, 3, padding=padding, bias=bias, dtype=torch.float64)
    points = "reference" if tile != 3 else "balanced"
    made = WinogradReLUConv2d.from_conv(conv, WinogradReLUSettings(tile=tile, points=points, relu=False))
    x = noise(2, 3, *size)
    if padding == 0 and min(size) < 3:
        with pytest.raises(TersenetError, match="smaller than the filter"):
            made(x)
        return
    torch.testing.assert_close(made(x), conv(x), rtol=0, atol=1e-12)
    assert made.bias is conv.bias


def test_fact_s2_gradients_are_the_closed_form_and_those_of_autograd() -> None:
    made, x = layer(), noise(2, 3, 5, 6).requires_grad_()
    at, _, bt = made.transforms(torch.float64)
    # dM = A dS A^T; dW = V^T dM; dV = dM W^T where B^T d B > 0; dd = B dV B^T, overlapping tiles added.
    padded = F.pad(x.detach(), (1, 1, 1, 2))
    tiles = padded.unfold(2, 4, 2).unfold(3, 4, 2)
    z = torch.einsum("it,nchwtu,ju->nchwij", bt, tiles, bt)
    weight = made.weight.detach().view(4, 4, 3, 4)
    product = torch.einsum("nchwij,ijck->nkhwij", z.relu(), weight)
    y = torch.einsum("ai,nkhwij,bj->nkhawb", at, product, at).flatten(4).flatten(2, 3)[:, :, :5, :6]
    assert made.bias is not None
    torch.testing.assert_close(made(x), y + made.bias[:, None, None])
    upstream = noise(2, 4, 5, 6, seed=3)
    kept = upstream.clone()
    made(x).backward(upstream)
    assert torch.equal(upstream, kept)
    d_tiles = F.pad(upstream, (0, 0, 0, 1)).unfold(2, 2, 2).unfold(3, 2, 2)
    d_product = torch.einsum("ai,nkhwab,bj->nkhwij", at, d_tiles, at)
    d_weight = torch.einsum("nchwij,nkhwij->ijck", z.relu(), d_product).reshape(16, 3, 4)
    d_z = torch.einsum("nkhwij,ijck->nchwij", d_product, weight) * (z > 0)
    d_d = torch.einsum("ti,nchwtu,uj->nchwij", bt, d_z, bt)
    d_x = torch.zeros_like(padded)
    for row in range(3):
        for column in range(3):
            d_x[:, :, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += d_d[:, :, row, column]
    assert made.weight.grad is not None
    torch.testing.assert_close(made.weight.grad, d_weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(x.grad, d_x[:, :, 1:6, 1:7], rtol=0, atol=1e-12)
    torch.testing.assert_close(made.bias.grad, upstream.sum((0, 2, 3)))


@pytest.mark.parametrize(("relu", "share"), [(True, 0.0), (True, 0.3), (True, 1.0), (False, 0.0)])
@pytest.mark.parametrize("tile", [2, 4])
def test_fact_s2_gradcheck(tile: int, relu: bool, share: float) -> None:
    made = layer(2, 2, tile=tile, relu=relu)
    made.spatial_share = share
    made.make_sparse()
    made.set_mask(torch.rand(made.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.4)
    x = noise(1, 2, 2, 3, seed=4)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(made, {"weight": weight, "bias": bias}, (x,))

    inputs = [value.detach().clone().requires_grad_() for value in (x, made.weight, made.bias) if value is not None]
    assert torch.autograd.gradcheck(function, inputs)


def test_fact_s3_layout() -> None:
    made, x = layer(3, 4), noise(2, 3, 5, 7)
    v = made.transformed(x, Activation(False)).view(16, 2, 3, 4, 3)
    _, _, bt = made.transforms(torch.float64)
    corner = F.pad(x, (1, 0, 1, 0))[:, :, :4, :4]
    assert torch.equal(bt, torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]).double())
    for row in range(4):
        for column in range(4):
            expected = (bt @ corner @ bt.t())[:, :, row, column]
            torch.testing.assert_close(v[4 * row + column, :, 0, 0], expected, rtol=0, atol=1e-12)


def test_fact_s4_the_relu_is_another_one_and_half_of_it_is_zero() -> None:
    made, x = layer(8, 4), noise(4, 8, 32, 32)
    here = made.transformed(x)
    native = made.transformed(x, Activation(True, 1.0))
    assert not torch.allclose(here, native)
    assert here.ne(0).double().mean() == pytest.approx(0.5, abs=0.01)
    assert native.ne(0).double().mean() > 0.9


@pytest.mark.parametrize("channels", [64, 128])
def test_fact_s5_the_published_draw(channels: int) -> None:
    made = WinogradReLUConv2d(channels, channels, bias=True)
    assert float(made.weight.detach().std()) == pytest.approx(0.1875 / channels**0.5, rel=0.02)
    assert float(made.weight.detach().abs().max()) < 2.3 * 0.1875 / channels**0.5


@pytest.mark.parametrize(("relu", "tile"), [(True, 2), (True, 4), (False, 2)])
def test_a_draw_that_keeps_the_variance(relu: bool, tile: int) -> None:
    made = WinogradReLUConv2d(64, 64, settings=WinogradReLUSettings(tile=tile, relu=relu))
    made.reset("unit")
    if (relu, tile) == (True, 2):
        assert float(made.weight.detach().var()) == pytest.approx(1 / (18 * 64), rel=0.02)
    y = made(noise(2, 64, 16, 16).float())
    assert float(y[:, :, 2:-2, 2:-2].detach().var()) == pytest.approx(1, rel=0.1)
    before = made.weight.clone()
    made.reset("transform")
    assert torch.equal(made.weight, before)


@pytest.mark.parametrize("tile", [2, 4])
def test_with_the_whole_share_it_is_relu_and_convolution(tile: int) -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1, dtype=torch.float64)
    made = WinogradReLUConv2d.from_conv(conv, WinogradReLUSettings(tile=tile))
    x = noise(2, 3, 7, 6)
    made.spatial_share = 1.0
    torch.testing.assert_close(made(x), conv(x.relu()))
    ends = []
    for share in (0.0, 1.0, 0.25):
        made.spatial_share = share
        ends.append(made(x))
    torch.testing.assert_close(ends[2], 0.75 * ends[0] + 0.25 * ends[1])


def test_images_a_few_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Tensor, ...]] = []
    for cached in (1, 2**40):
        monkeypatch.setattr(Passes, "cached", cached)
        made, x = layer(), noise(5, 3, 6, 6).requires_grad_()
        y = made(x)
        y.square().sum().backward()
        assert x.grad is not None
        assert made.weight.grad is not None
        found.append((y, x.grad, made.weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_keeps_the_input_and_the_weight_alone() -> None:
    made, x = layer(8, 8), noise(4, 8, 16, 16).requires_grad_()
    made.make_sparse()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made(x)
    large = {tensor.data_ptr() for tensor in saved if tensor.numel() > 1000}
    assert large == {x.data_ptr(), made.weight.data_ptr(), made.mask.data_ptr() if made.mask is not None else 0}


def test_memory_order_type_and_autocast() -> None:
    made = layer().float()
    x = noise(2, 3, 6, 6).float()
    nhwc = made(x.contiguous(memory_format=torch.channels_last))
    assert nhwc.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(nhwc, made(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(x), made(x.clone()))
        assert torch.equal(made(x), made(x.clone()))
        assert made(x).dtype == torch.float32
    assert made(x.bfloat16()).dtype == torch.bfloat16
    # Half precision inside would be off by a hundredth.
    torch.testing.assert_close(made(x.bfloat16()).float(), made(x.bfloat16().float()), rtol=0.01, atol=0.05)


def test_masked_weights_count_as_zero_whatever_is_stored() -> None:
    made, x = layer(), noise(2, 3, 6, 6)
    made.make_sparse()
    mask = torch.rand(made.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    made.set_mask(mask)
    expected = made(x)
    with torch.no_grad():
        made.weight.masked_fill_(~mask, float("inf"))
    assert torch.equal(made(x), expected)
    made(x).sum().backward()
    assert made.weight.grad is not None
    assert not made.weight.grad[~mask].any()
    assert made.density == mask.double().mean()
    made.clean()
    assert not made.weight[~mask].any()
    assert masked_layers(made) == {"": made}
    copied = copy.deepcopy(made)
    assert torch.equal(copied(x), expected)


def test_a_masked_convolution() -> None:
    conv = nn.Conv2d(4, 6, 3, 2, 1, dtype=torch.float64)
    masked = MaskedConv2d.from_conv(conv)
    x = noise(2, 4, 7, 7)
    assert torch.equal(masked(x), conv(x))
    mask = torch.rand(9, 4, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(masked.canonical(masked.stored(mask)), mask)
    masked.set_mask(mask)
    assert torch.equal(masked.canonical(masked.weight).ne(0), mask)
    by_hand = conv.weight.detach().clone()
    for tap in range(9):
        by_hand[:, :, tap // 3, tap % 3] *= mask[tap].t()
    assert torch.equal(masked(x), F.conv2d(x, by_hand, conv.bias, 2, 1))


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 3, 2), "stride"),
        (nn.Conv2d(4, 4, 3, groups=2), "grouped"),
        (nn.Conv2d(4, 4, 3, groups=4), "depthwise"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilated"),
        (nn.Conv2d(4, 4, 1), "kernel is 1x1"),
        (nn.Conv2d(4, 4, (3, 5)), "kernel is 3x5"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding is reflect"),
    ],
)
def test_what_it_can_not_be(conv: nn.Conv2d, reason: str) -> None:
    assert reason in (hindrance(conv) or "")
    with pytest.raises(TersenetError, match=reason):
        WinogradReLUConv2d.from_conv(conv)


def test_bad_inputs_are_named() -> None:
    with pytest.raises(TersenetError, match=r"in_channels \(=3\) got an input \(2, 4, 6, 6\)"):
        layer()(noise(2, 4, 6, 6))
    with pytest.raises(TersenetError, match=r"F\(2, 3\)"):
        layer(points=("0", "1"))


@pytest.mark.parametrize("init", ["reference", "unit"])
def test_a_draw_keeps_the_mask(init: Init) -> None:
    made = layer()
    made.make_sparse()
    mask = torch.zeros_like(made.weight, dtype=torch.bool)
    mask[:4] = True
    made.set_mask(mask)
    made.reset(init)
    assert made.weight[:4].all()
    assert not made.weight[4:].any()


def test_the_kronecker_square_of_g_is_the_start() -> None:
    conv = nn.Conv2d(2, 3, 3, dtype=torch.float64)
    made = WinogradReLUConv2d.from_conv(conv, LINEAR)
    _, g, _ = made.transforms(torch.float64)
    for k in range(3):
        for c in range(2):
            expected = g @ conv.weight[k, c] @ g.t()
            torch.testing.assert_close(made.weight[:, c, k].view(4, 4), expected)
    assert kronecker(g).shape == (16, 9)


class Calls(nn.Module):
    """ReLUs in every way of writing them."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.inner = nn.Sequential(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x) - 1
        x = F.relu(x) - 2
        x = torch.relu(x) - 3
        x = x.relu() - 4
        x = self.inner(x.clone()) - 5
        return x.relu_() - 6


@pytest.mark.parametrize("skipped", [(), (0,), (1, 3), (0, 2, 4), (0, 1, 2, 3, 4, 5), (5,)])
def test_calls_of_relu_are_left_out(skipped: tuple[int, ...]) -> None:
    x = 8 * noise(100)
    model, expected = Calls(), x
    for call in range(6):
        expected = (expected if call in skipped else expected.relu()) - call - 1
    for call in skipped:
        skip_relu(model, call)
    for network in (model, copy.deepcopy(model)):
        torch.testing.assert_close(network(x.clone()), expected)
        torch.testing.assert_close(network(x.clone()), expected)
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(exported(x.clone()), expected)
    assert type(model).__name__ == "Calls"


def test_inner_modules_count_for_themselves() -> None:
    model = nn.Sequential(Calls(), Calls())
    skip_relu(model[0], 1)
    skip_relu(model, 2)
    plain = nn.Sequential(Calls(), Calls())
    skip_relu(plain[0], 1)
    skip_relu(plain[1], 2)
    x = 20 * noise(100)
    torch.testing.assert_close(model(x.clone()), plain(x.clone()))
