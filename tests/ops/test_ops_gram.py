"""Streamed moments against moments of all rows at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersenet.kernels.moments_call import TileMoments, usable
from tersenet.ops import gram
from tersenet.ops.gram import Moments, StatisticsError


def rows(count: int, inputs: int = 5, outputs: int = 3, seed: int = 0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64) + shift
    return x, x @ torch.randn(inputs, outputs, generator=generator, dtype=torch.float64) + shift


def collected(*chunks: tuple[Tensor, Tensor]) -> Moments:
    moments = Moments("conv", chunks[0][0].shape[1], chunks[0][1].shape[1])
    for x, y in chunks:
        moments.add(x, y)
    return moments


def assert_same(moments: Moments, x: Tensor, y: Tensor, tolerance: float) -> None:
    x, y = x.double(), y.double()
    dx, dy = x - x.mean(0), y - y.mean(0)
    assert moments.rows == len(x)
    torch.testing.assert_close(moments.mean_x, x.mean(0), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moments.mean_y, y.mean(0), rtol=tolerance, atol=tolerance)
    for mine, exact in ((moments.xx, dx.T @ dx), (moments.xy, dx.T @ dy), (moments.yy, dy.T @ dy)):
        assert float((mine - exact).norm()) <= tolerance * float(exact.norm())
    assert moments.energy == pytest.approx(float(dy.square().sum()), rel=tolerance)


@settings(deadline=None, max_examples=10)
@given(cuts=st.lists(st.integers(0, 5000), max_size=6), shift=st.sampled_from([0.0, 30.0]))
def test_fact_1_any_chunks_give_the_moments_of_all_rows_bit_for_bit(cuts: list[int], shift: float) -> None:
    x, y = rows(5000, shift=shift)
    edges = [0, *sorted(cuts), 5000]
    chunked = collected(*((x[a:b], y[a:b]) for a, b in pairwise(edges)))
    assert_same(chunked, x, y, 1e-12)
    once = collected((x, y))
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        assert torch.equal(getattr(chunked, name), getattr(once, name))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_fact_1_float32_rows_far_from_zero(offset: float) -> None:
    """Without centring, squares of 1e6 would leave float32 no digits for a variance of 1."""
    x, y = (values.float() + offset for values in rows(9000))
    moments = collected((x, y))
    assert_same(moments, x, y, 1e-6)
    assert moments.precision == torch.finfo(torch.float32).eps


def test_blocks_that_differ_in_mean() -> None:
    x, y = rows(6000)
    x += torch.arange(6000)[:, None] / 100
    assert_same(collected((x.float(), y.float())), x.float(), y.float(), 1e-6)


def test_more_inputs_than_a_tile_are_symmetric() -> None:
    x, y = rows(300, inputs=1100)
    moments = collected((x, y))
    assert_same(moments, x, y, 1e-12)
    assert torch.equal(moments.xx, moments.xx.T)
    moments.add(x, y)
    assert_same(moments, torch.cat([x, x]), torch.cat([y, y]), 1e-12)


@settings(deadline=None, max_examples=25)
@given(first=st.integers(0, 3000), second=st.integers(0, 3000), shift=st.sampled_from([0.0, 100.0]))
def test_merging_is_one_pass(first: int, second: int, shift: float) -> None:
    a, b = rows(first, seed=1), rows(second, seed=2, shift=shift)
    left, right = collected(a), collected(b)
    left.merge(right)
    if first + second:
        assert_same(left, torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]), 1e-11)
    left.add(*a)
    if first:
        assert_same(left, torch.cat([a[0], b[0], a[0]]), torch.cat([a[1], b[1], a[1]]), 1e-11)
    assert right.rows == second


def test_reading_between_chunks_changes_nothing_that_matters() -> None:
    x, y = rows(3000)
    moments = Moments("conv", 5, 3)
    for part in range(30):
        moments.add(x[part * 100 : part * 100 + 100], y[part * 100 : part * 100 + 100])
        assert_same(moments, x[: part * 100 + 100], y[: part * 100 + 100], 1e-12)


def test_some_outputs_alone_have_the_moments_of_those_rows() -> None:
    x, y = rows(3000, inputs=700)
    moments, chosen = collected((x, y)), torch.tensor([True, False, True])
    part = moments.of_outputs(chosen)
    assert_same(part, x, y[:, chosen], 1e-12)
    assert (part.outputs, part.inputs, part.rows) == (2, 700, 3000)
    assert_same(moments, x, y, 1e-12)
    assert moments.of_outputs(torch.ones(3, dtype=torch.bool)) is moments


def test_half_precision_rows_are_multiplied_in_float32() -> None:
    x, y = (values.half() * 100 for values in rows(100))
    assert_same(collected((x, y)), x, y, 1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize(("count", "row"), [(10, 3), (5000, 4700)])
def test_values_that_are_not_finite_are_refused_whole(value: float, where: int, count: int, row: int) -> None:
    """However many blocks are full before they come."""
    good, bad = rows(10), rows(count)
    bad[where][row, 1] = value
    moments = collected(good)
    with pytest.raises(StatisticsError, match=f"{('inputs', 'target outputs')[where]} of 'conv' hold 1 value"):
        moments.add(*bad)
    assert_same(moments, *good, 1e-12)


def test_rows_of_another_shape_are_refused() -> None:
    moments = Moments("conv", 5, 3)
    for x, y in (((4, 5), (3, 3)), ((4, 4), (4, 3)), ((4, 5), (4, 2))):
        with pytest.raises(ValueError, match="takes rows of 5 and 3"):
            moments.add(torch.zeros(x), torch.zeros(y))
    with pytest.raises(ValueError, match="can't be merged"):
        moments.merge(Moments("other", 5, 4))
    with pytest.raises(ValueError, match="at least one"):
        Moments("none", 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constants_have_no_moments_whatever_their_rounding(dtype: torch.dtype) -> None:
    x, y = (values.to(dtype) for values in rows(5000))
    x[:, 1], x[:, 3], y[:, 2] = 0.3, 1e5 / 3, -0.7
    moments = collected((x, y))
    for matrix in (moments.xx[1], moments.xx[:, 3], moments.xy[3], moments.xy[:, 2], moments.yy[2]):
        assert matrix.eq(0).all()
    assert_same(moments, x, y, 1e-6)
    x[:, 1] += 1e-3 * torch.randn(5000, generator=torch.Generator().manual_seed(1), dtype=dtype)
    moments.add(x, y)
    assert float(moments.xx[1, 1]) == pytest.approx(5000e-6, rel=0.1)


@pytest.fixture(params=["matrix tiles", "products in float32"])
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layers of this width have their products made in two ways."""
    if request.param != "matrix tiles":
        monkeypatch.setattr(gram, "usable", lambda: False)
    elif not usable():
        pytest.skip("this processor has no matrix tiles of bytes")
    return request.param


def activations(count: int, inputs: int = 500, outputs: int = 20, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Float32 rows behind a ReLU, of fewer latent values than columns."""
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(count, 40, generator=generator)
    x = (latent @ torch.randn(40, inputs, generator=generator) + torch.randn(count, inputs, generator=generator)).relu()
    x = x * torch.randn(inputs, generator=generator).exp() + shift
    return x, x @ torch.randn(inputs, outputs, generator=generator) / inputs + shift


def worst(moments: Moments, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square error of all second moments, each in units of the two columns' norms."""
    rows = torch.cat([x, y], 1).double()
    apart = rows - rows.mean(0)
    norms = apart.norm(dim=0)
    mine = torch.cat([torch.cat([moments.xx, moments.xy], 1), torch.cat([moments.xy.T, moments.yy], 1)])
    error = (mine - apart.T @ apart) / (norms[:, None] * norms)
    return float(error.abs().max()), float(error.square().mean().sqrt())


def test_wide_layers_are_as_exact_as_float32(wide: str) -> None:
    x, y = activations(4000)
    largest, typical = worst(collected((x, y)), x, y)
    assert largest < 3e-6
    assert typical < 3e-7


def test_wide_layers_far_from_zero(wide: str) -> None:
    """An offset of a thousand deviations takes float32 rows ten of their bits; what is left of them counts."""
    x, y = activations(4000, shift=1000.0)
    moments = collected((x, y))
    largest, typical = worst(moments, x, y)
    assert largest < 3e-6
    assert typical < 3e-7
    torch.testing.assert_close(moments.mean_x, x.double().mean(0), rtol=1e-7, atol=0)


def test_wide_layers_with_means_that_move(wide: str) -> None:
    x, y = activations(5000)
    moved = torch.arange(5000)[:, None] / 100
    assert worst(collected((x + moved, y - moved)), x + moved, y - moved)[0] < 3e-6


@settings(deadline=None, max_examples=4)
@given(cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_fact_1_wide_layers_have_the_same_bits_in_any_chunks(cuts: list[int]) -> None:
    x, y = activations(3000)
    edges = [0, *sorted(cuts), 3000]
    chunked, once = collected(*((x[a:b], y[a:b]) for a, b in pairwise(edges))), collected((x, y))
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        assert torch.equal(getattr(chunked, name), getattr(once, name))


def test_wide_layers_merge_and_read_as_narrow_ones_do(wide: str) -> None:
    x, y = activations(3000)
    moments, other = Moments("conv", 500, 20), collected((x[1000:2000], y[1000:2000]))
    moments.add(x[:500], y[:500])
    assert torch.equal(moments.lower.tril(), moments.xx.tril())
    moments.add(x[500:1000], y[500:1000])
    moments.merge(other)
    moments.add(x[2000:], y[2000:])
    assert worst(moments, x, y)[0] < 3e-6
    assert torch.equal(moments.xx, moments.xx.T)
    assert moments.rows == 3000
    assert other.rows == 1000


def test_wide_constants_have_no_moments(wide: str) -> None:
    x, y = activations(3000)
    x[:, 1], x[:, 3], y[:, 2] = 0.3, 1e5 / 3, -0.7
    moments = collected((x, y))
    for matrix in (moments.xx[1], moments.xx[:, 3], moments.xy[3], moments.xy[:, 2], moments.yy[2]):
        assert matrix.eq(0).all()


def test_wide_layers_that_depend_linearly_are_seen_to(wide: str) -> None:
    """What float32 leaves of a column that others make up is below the limit by which fits tell it."""
    x, y = activations(4000)
    x[:, 7] = x[:, 1] + x[:, 2] - 0.5 * x[:, 3]
    x[:, 9] = x[:, 4]
    moments = collected((x, y))
    triangle, failed = torch.linalg.cholesky_ex(moments.xx[1:10, 1:10])
    own = triangle.diagonal().square() / moments.xx.diagonal()[1:10]
    assert int(failed) or float(own[[6, 8]].max()) < 8 * moments.precision
    assert float(own[:6].min()) > 8 * moments.precision


@pytest.mark.parametrize(("inputs", "dtype"), [(500, torch.float64), (40, torch.float32)])
def test_tiles_are_for_wide_layers_in_float32(inputs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(columns: int) -> TileMoments:
        raise AssertionError(f"{columns} columns of {dtype} went to the tiles")

    monkeypatch.setattr(gram, "TileMoments", refused)
    x, y = (values.to(dtype) for values in activations(100, inputs))
    assert worst(collected((x, y)), x, y)[0] < 1e-5
