"""Winograd equals the direct convolution; its gradients equal autograd's, through every quantizer too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d, pad

from tersenet.errors import TersenetError
from tersenet.ops import winograd_stages
from tersenet.ops.cook_toom import cook_toom
from tersenet.ops.fake_quantize import Rounding, batch_range, empty_range, fake_quantize, scale_of
from tersenet.ops.winograd import Matrices, Stage, Stages, kronecker, winograd_conv2d
from tersenet.ops.winograd_stages import images_at_once
from tersenet.ops.winograd_tiles import (
    Geometry,
    input_tiles,
    input_tiles_adjoint,
    output_image,
    output_image_adjoint,
    padded_image,
    weight_taps,
    weight_taps_adjoint,
)

SIZES = [(2, 3), (4, 3), (6, 3), (2, 5), (4, 5), (6, 5)]


def triple(m: int, r: int, dtype: torch.dtype = torch.float64, points: str = "balanced") -> list[Tensor]:
    made = cook_toom(m, r, points)
    return [torch.tensor([[float(x) for x in row] for row in rows], dtype=dtype) for rows in (made.at, made.g, made.bt)]


def squares(m: int, r: int, dtype: torch.dtype = torch.float64) -> Matrices:
    """Rounded once, as layers have them."""
    return Matrices(*(kronecker(matrix).to(dtype) for matrix in triple(m, r)))


def direct(x: Tensor, weight: Tensor, bias: Tensor | None, at: Geometry) -> Tensor:
    padded = pad(x, (*at.padding[1], *at.padding[0]))
    return conv2d(padded, weight, bias, at.stride, 0, at.dilation, at.groups)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Geometry, int, int]:
    padding = st.tuples(st.integers(0, 4), st.integers(0, 4))
    kernel = draw(st.sampled_from([(3, 3), (5, 5), (7, 7), (1, 1), (2, 2), (1, 3), (4, 3)]))
    at = Geometry(
        draw(st.integers(1, 6)), kernel, draw(PAIR), (draw(padding), draw(padding)), draw(PAIR), draw(st.integers(1, 3))
    )
    h, w = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    assume(at.tile + at.taps <= 11)
    for axis, size in enumerate((h, w)):
        assume(size + sum(at.padding[axis]) > at.dilation[axis] * (kernel[axis] - 1))
    return at, h, w


@settings(max_examples=80, deadline=None)
@given(case=cases(), bias=st.booleans(), seed=st.integers(0, 99))
def test_equals_the_direct_convolution_and_its_gradients(
    case: tuple[Geometry, int, int], bias: bool, seed: int
) -> None:
    """W1, W3, W8: sizes, paddings, strides, dilations, groups; float64, output and gradients."""
    at, h, w = case
    torch.manual_seed(seed)
    x = torch.randn(2, 2 * at.groups, h, w, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3 * at.groups, 2, *at.kernel, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3 * at.groups, dtype=torch.float64, requires_grad=True) if bias else None
    leaves = [x, weight] if b is None else [x, weight, b]
    expected = direct(x, weight, b, at)
    found, _ = winograd_conv2d(x, weight, b, squares(at.tile, at.taps), at)
    # Where a filter sees nothing but padding, the exact result is zero, and ours is rounding.
    size = float(x.detach().abs().max() * weight.detach().abs().sum())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13 * size)
    gradient = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, leaves, gradient) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * max(float(other.abs().max()), 1e-3 * size))


@settings(max_examples=40, deadline=None)
@given(case=cases(), channels_last=st.booleans())
def test_adjoints(case: tuple[Geometry, int, int], channels_last: bool) -> None:
    """<tiles(x), e> = <x, adjoint(e)>, for what moves images, weights and outputs."""
    at, h, w = case
    x = torch.randn(2, at.groups, h, w, dtype=torch.float64)
    tiles = input_tiles(padded_image(x, at), at)
    e = torch.randn_like(tiles)
    torch.testing.assert_close((tiles * e).sum(), (x * input_tiles_adjoint(e, at, x.shape)).sum())
    weight = torch.randn(at.groups, 1, *at.kernel, dtype=torch.float64)
    taps = weight_taps(weight, at)
    e = torch.randn_like(taps)
    torch.testing.assert_close((taps * e).sum(), (weight * weight_taps_adjoint(e, at, weight.shape)).sum())
    out = torch.randn(at.tile, at.tile, at.groups, *tiles.shape[3:6], 2, dtype=torch.float64)
    image = output_image(out, at, (2, h, w), channels_last)
    e = torch.randn_like(image)
    torch.testing.assert_close((image * e).sum(), (out * output_image_adjoint(e, at, h, w)).sum())


@pytest.mark.parametrize(("m", "r"), SIZES)
def test_every_size_from_5_to_33(m: int, r: int) -> None:
    """W1, W8: F(m, r) of the table, odd and unequal sizes, padding 0 to r, float64 and float32."""
    torch.manual_seed(0)
    weight = torch.randn(3, 4, r, r, dtype=torch.float64)
    for h in range(5, 34, 7):
        for padding in range(r + 1):
            at = Geometry(m, (r, r), padding=((padding, padding), (padding, padding)))
            x = torch.randn(1, 4, h, 38 - h, dtype=torch.float64)
            expected = direct(x, weight, None, at)
            assert relative(winograd_conv2d(x, weight, None, squares(m, r), at)[0], expected) < 1e-10
            found, _ = winograd_conv2d(x.float(), weight.float(), None, squares(m, r, torch.float32), at)
            assert relative(found, expected) < (2e-5 if m == 6 else 1e-5)


@pytest.mark.parametrize("width", [257, 260, 512])
def test_wide_maps(width: int) -> None:
    """W8; the reference returns an empty tensor above 256."""
    at = Geometry(4, (3, 3), padding=((1, 1), (1, 1)))
    x, weight = torch.randn(1, 1, 3, width, dtype=torch.float64), torch.randn(1, 1, 3, 3, dtype=torch.float64)
    assert relative(winograd_conv2d(x, weight, None, squares(4, 3), at)[0], direct(x, weight, None, at)) < 1e-10


def test_polyphase_does_fewer_multiplications_than_all_positions() -> None:
    """A stride of 2 leaves a filter of half the taps on four phases: 4 (5/4)^2 products of F(4, 2) instead of 9."""
    at = Geometry(4, (3, 3), stride=(2, 2))
    assert at.taps == 2
    x = torch.randn(1, 1, 17, 17)
    tiles = input_tiles(padded_image(x, at), at)
    assert tiles.shape == (5, 5, 1, 1, 2, 2, 4)
    assert Geometry(4, (3, 3), stride=(2, 2), dilation=(2, 2)).taps == 3


def test_gradcheck_of_everything() -> None:
    """W3: input, weight, bias and the transforms, by finite differences."""
    torch.manual_seed(0)
    at = Geometry(2, (3, 3), (2, 1), ((1, 0), (1, 2)), (1, 2), 2)
    matrices = [matrix.requires_grad_() for matrix in triple(2, at.taps)]
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor, *matrices: Tensor) -> Tensor:
        return winograd_conv2d(x, weight, bias, Matrices(*map(kronecker, matrices)), at)[0]

    assert torch.autograd.gradcheck(run, (x, weight, bias, *matrices), atol=1e-6)


def plain(x: Tensor, weight: Tensor, matrices: Matrices, at: Geometry, r: list[Any], s: list[Tensor]) -> Tensor:
    """The same layer in ordinary operators, for autograd."""
    n, _, h, w = x.shape
    tiles = input_tiles(padded_image(fake_quantize(x, s[0], r[0]), at), at)
    v = (matrices.bb @ tiles.reshape(matrices.bb.shape[0], -1)).view(
        -1, at.groups, tiles[0, 0, 0, ..., 0].numel(), tiles.shape[-1]
    )
    taps = weight_taps(fake_quantize(weight, s[1], r[1]), at)
    u = (matrices.gg @ taps.reshape(matrices.gg.shape[1], -1)).view(v.shape[0], at.groups, *taps.shape[3:])
    v, u = fake_quantize(v, s[2], r[2]), fake_quantize(u, s[3], r[3])
    product = fake_quantize(v @ u, s[4], r[4])
    y = (matrices.aa @ product.view(product.shape[0], -1)).view(at.tile, at.tile, at.groups, *tiles.shape[3:6], -1)
    return fake_quantize(output_image(y, at, (n, h, w), False), s[5], r[5])


SHAPES = {
    "tensor": [(1, 1, 1, 1)] * 6,
    "tap": [(1, 1, 1, 1), (4, 1, 1, 1), (36, 1, 1, 1), (36, 1, 1, 1), (36, 1, 1, 1), (1, 1, 1, 1)],
    "tap_channel": [(1, 1, 1, 1), (4, 1, 1, 1), (36, 2, 1, 3), (36, 2, 1, 2), (36, 2, 1, 2), (1, 1, 1, 1)],
}


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image at a time, as if the cache were tiny."""
    monkeypatch.setattr(winograd_stages, "_CACHED", 0)
    monkeypatch.setattr(winograd_stages, "_ROWS", 1)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("per", SHAPES)
@pytest.mark.parametrize("kind", ["straight", "clip", "learned"])
def test_gradients_through_the_quantizers(per: str, kind: str) -> None:
    """What is computed again in backward, image by image, gives the gradients of the layer written in ordinary
    operators."""
    torch.manual_seed(1)
    at = Geometry(4, (3, 3), padding=((1, 1), (1, 1)), groups=2)
    x = torch.randn(3, 6, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    matrices = Matrices(*(matrix.requires_grad_() for matrix in squares(4, 3)))
    rounding = [Rounding(5, shape, False, kind != "straight", kind == "learned") for shape in SHAPES[per]]
    # Scales so small that much is clipped.
    sizes = (0.1, 0.1, 0.3, 0.05, 0.5, 0.2)
    scales = [torch.full(r.shape, s, dtype=torch.float64) for r, s in zip(rounding, sizes, strict=True)]
    leaves = [x, weight, *matrices]
    if kind == "learned":
        leaves += [scale.requires_grad_() for scale in scales]
    found, _ = winograd_conv2d(x, weight, None, matrices, at, Stages(*map(Stage, rounding)), scales)
    expected = plain(x, weight, matrices, at, rounding, scales)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradient = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(y, leaves, gradient) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("observing", ["no", "moving", "joined"])
def test_a_few_images_at_a_time_change_nothing(
    monkeypatch: pytest.MonkeyPatch, observing: Any, layout: torch.memory_format
) -> None:
    """Output, ranges and gradients, of strided, dilated, cropped and grouped maps too."""
    torch.manual_seed(2)
    geometries = [
        Geometry(4, (3, 3), padding=((1, 1), (1, 1)), groups=2),
        Geometry(2, (3, 3), (2, 1), ((1, 0), (1, 2)), (1, 2), 2),
    ]
    for at in geometries:
        t = (at.tile + at.taps - 1) ** 2
        shapes = [(1, 1, 1, 1)] * 2 + [(t, 1, 1, 1)] * 3 + [(1, 1, 1, 1)]
        stages = Stages(*(Stage(Rounding(6, shape, clip_gradient=True), observing) for shape in shapes))
        states = [empty_range(shape) if observing != "no" else torch.full(shape, 0.05) for shape in shapes]
        x = torch.randn(5, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
        matrices = Matrices(*(matrix.requires_grad_() for matrix in squares(at.tile, at.taps)))
        leaves = [x, weight, bias, *matrices]
        found: list[list[Tensor | None]] = []
        for at_once in (0, 10**9):
            monkeypatch.setattr(winograd_stages, "_CACHED", at_once)
            # Two images of the first map: the last part is smaller.
            monkeypatch.setattr(winograd_stages, "_ROWS", 12)
            assert (images_at_once(x, weight, at) is None) == bool(at_once)
            y, ranges = winograd_conv2d(x, weight, bias, matrices, at, stages, states)
            assert y.is_contiguous(memory_format=layout)
            found.append([y, *ranges, *torch.autograd.grad(y.square().sum(), leaves)])
        for one, other in zip(*found, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * float(other.detach().abs().max()))


def test_what_is_taken_at_once() -> None:
    """A MiB on a CPU, but rows enough to be worth reading the weight; all while a program is exported."""
    at, weight = Geometry(4, (3, 3), padding=((1, 1), (1, 1))), torch.ones(64, 64, 3, 3)
    at_once = images_at_once(torch.ones(32, 64, 32, 32), weight, at)
    assert at_once is not None
    assert 1 <= at_once <= 4
    assert images_at_once(torch.ones(32, 64, 32, 32, device="meta"), weight, at) is None
    assert images_at_once(torch.ones(64, 512, 4, 4), torch.ones(512, 512, 3, 3), at) is None


def test_a_stage_that_observes_uses_the_range_with_this_batch_in_it() -> None:
    at, x, weight = Geometry(2, (3, 3)), torch.randn(1, 2, 6, 6), torch.randn(2, 2, 3, 3)
    rounding = Rounding(4, (1, 1, 1, 1))
    stages = Stages(input=Stage(rounding, "moving", 0.5))
    before = torch.tensor([-1.0, 9.0]).view(2, 1, 1, 1, 1)
    y, ranges = winograd_conv2d(x, weight, None, squares(2, 3, torch.float32), at, stages, [before, *[None] * 5])
    low, high = batch_range(x, (1, 1, 1, 1)).flatten().tolist()
    assert ranges[0] is not None
    assert ranges[0].flatten().tolist() == pytest.approx([(low - 1) / 2, (high + 9) / 2])
    assert ranges[1:] == (None,) * 5
    rounded = fake_quantize(x, scale_of(ranges[0], rounding), rounding)
    assert relative(y, direct(rounded, weight, None, at)) < 1e-5
    trained, _ = winograd_conv2d(
        x, weight.requires_grad_(), None, squares(2, 3, torch.float32), at, stages, [before, *[None] * 5]
    )
    assert torch.equal(trained, y)
    assert torch.equal(empty_range((1,)), torch.tensor([[torch.inf], [-torch.inf]]))


def kept(function: Any) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return list(found.values())


@pytest.mark.parametrize("m", [2, 4, 6])
def test_only_input_weight_and_small_tensors_are_kept(m: int) -> None:
    """W11: at most input + weight + 5 %, trained transforms and every quantizer included."""
    x, weight = torch.randn(8, 64, 32, 32, requires_grad=True), torch.randn(64, 64, 3, 3, requires_grad=True)
    matrices = [matrix.requires_grad_() for matrix in triple(m, 3, torch.float32)]
    tap = ((m + 2) ** 2, 1, 1, 1)
    shapes = ((1, 1, 1, 1), (1, 1, 1, 1), tap, tap, tap, (1, 1, 1, 1))
    stages = Stages(*(Stage(Rounding(8, shape, clip_gradient=True), "moving") for shape in shapes))
    states = [empty_range(shape) for shape in shapes]
    at = Geometry(m, (3, 3), padding=((1, 1), (1, 1)))

    tensors = kept(lambda: winograd_conv2d(x, weight, None, Matrices(*map(kronecker, matrices)), at, stages, states))
    size = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert size <= 1.05 * 4 * (x.numel() + weight.numel())
    assert {x.data_ptr(), weight.data_ptr()} <= {tensor.data_ptr() for tensor in tensors}


def test_layout_follows_the_input() -> None:
    at, weight = Geometry(4, (3, 3)), torch.randn(8, 8, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 9, 7).contiguous(memory_format=layout)
        assert winograd_conv2d(x, weight, None, squares(4, 3, torch.float32), at)[0].is_contiguous(memory_format=layout)


def test_transforms_stay_in_float32_under_autocast() -> None:
    """In bfloat16 throughout the error of F(4, 3) would be 2e-2 (spec 0.3); of the rounded result it is 2e-3."""
    torch.manual_seed(0)
    at = Geometry(4, (3, 3))
    x, weight = torch.randn(2, 64, 18, 18), torch.randn(64, 64, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = winograd_conv2d(x, weight, None, squares(4, 3, torch.float32), at)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert relative(y, conv2d(x, weight)) < 3e-3
    assert weight.grad is not None
    assert relative(weight.grad, torch.autograd.grad(conv2d(x, weight).sum(), weight)[0]) < 1e-5
    half, _ = winograd_conv2d(x.half(), weight.half(), None, squares(4, 3, torch.float32), at)
    assert half.dtype == torch.float16
    assert relative(half, conv2d(x, weight)) < 1e-3


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(1, 1, 5, 5, requires_grad=True), torch.randn(1, 1, 3, 3)
    y, _ = winograd_conv2d(x, weight, None, squares(2, 3, torch.float32), Geometry(2, (3, 3)))
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_no_images() -> None:
    x, weight = torch.ones(0, 2, 7, 9, requires_grad=True), torch.ones(4, 2, 3, 3, requires_grad=True)
    y, _ = winograd_conv2d(x, weight, None, squares(4, 3, torch.float32), Geometry(4, (3, 3)))
    y.sum().backward()
    assert y.shape == (0, 4, 5, 7)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_map_smaller_than_the_filter() -> None:
    with pytest.raises(TersenetError, match="2 rows is smaller than the filter's reach"):
        winograd_conv2d(torch.ones(1, 1, 2, 9), torch.ones(1, 1, 3, 3), None, squares(4, 3), Geometry(4, (3, 3)))
