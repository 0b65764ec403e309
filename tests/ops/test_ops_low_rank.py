"""Decompositions: full rank is exact, every rank's error is the one foretold, and the pair is what it replaces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tersenet.ops.gram import Moments
from tersenet.ops.least_squares import fit
from tersenet.ops.low_rank import (
    channel_pair,
    composed,
    merge_pointwise,
    merging_pays,
    reduced_rank,
    spatial_decomposition,
)
from tersenet.ops.relu_fit import whitener


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def collected(x: Tensor, y: Tensor) -> Moments:
    moments = Moments("conv", x.shape[1], y.shape[1])
    moments.add(x, y)
    return moments


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (2, 6, 5, 3), (7, 1, 3, 3), (3, 2, 1, 1)])
def test_fact_13_spatial_full_rank_is_exact_and_each_rank_misses_its_tail(shape: tuple[int, int, int, int]) -> None:
    weight = normal(*shape)
    found = spatial_decomposition(weight)
    most = min(shape[1] * shape[2], shape[0] * shape[3])
    assert found.errors.shape == (most + 1,)
    assert found.errors[0] == 1
    for rank in range(1, most + 1):
        vertical, horizontal = found.pair(rank)
        assert vertical.shape == (rank, shape[1], shape[2], 1)
        assert horizontal.shape == (shape[0], rank, 1, shape[3])
        missed = float((weight - composed(vertical, horizontal)).square().sum() / weight.square().sum())
        assert missed == pytest.approx(float(found.errors[rank]), rel=1e-5, abs=1e-12)
    torch.testing.assert_close(composed(*found.pair(most)), weight)


@settings(deadline=None, max_examples=25)
@given(
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    rank=st.integers(1, 9),
)
def test_fact_13_the_two_convolutions_are_the_composed_one(
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], rank: int
) -> None:
    vertical, horizontal = spatial_decomposition(normal(5, 3, 3, 3)).pair(rank)
    x, bias = normal(2, 3, 9, 8, seed=1), normal(5, seed=2)
    between = F.conv2d(x, vertical, None, (stride[0], 1), (padding[0], 0), (dilation[0], 1))
    both = F.conv2d(between, horizontal, bias, (1, stride[1]), (0, padding[1]), (1, dilation[1]))
    torch.testing.assert_close(both, F.conv2d(x, composed(vertical, horizontal), bias, stride, padding, dilation))


def test_spatial_of_zeros_and_bad_requests() -> None:
    zero = spatial_decomposition(torch.zeros(2, 3, 3, 3))
    assert zero.errors.eq(0).all()
    with pytest.raises(ValueError, match="takes a weight"):
        spatial_decomposition(torch.zeros(2, 3))
    for rank in (0, 7):
        with pytest.raises(ValueError, match=f"from 1 to 6, not {rank}"):
            zero.pair(rank)


def responses(count: int = 500, outputs: int = 7) -> tuple[Tensor, Tensor]:
    """Responses of a compressed layer, and those of the original."""
    current = normal(count, outputs) @ normal(outputs, outputs, seed=1) + 3
    return current, current @ (torch.eye(outputs) + 0.3 * normal(outputs, outputs, seed=2)) + 0.5 * normal(
        count, outputs, seed=3
    )


def test_fact_14_reduced_rank_regression_is_that_of_all_rows() -> None:
    x, y = responses()
    found = reduced_rank(collected(x, y))
    dx, dy = x - x.mean(0), y - y.mean(0)
    fitted = dx @ torch.linalg.lstsq(dx, dy).solution
    for rank in range(1, 8):
        left, right, intercept = found.fit(rank)
        # The published way: a singular value decomposition of all fitted rows.
        u, s, v = torch.linalg.svd(fitted, full_matrices=False)
        best = torch.linalg.lstsq(dx, (u[:, :rank] * s[:rank]) @ v[:rank]).solution
        torch.testing.assert_close(left @ right, best, rtol=1e-8, atol=1e-8)
        assert int(torch.linalg.matrix_rank(left @ right)) == rank
        missed = (y - x @ left @ right - intercept).square().sum() / dy.square().sum()
        assert float(found.errors[rank]) == pytest.approx(float(missed), rel=1e-8)
        torch.testing.assert_close(right @ right.T, torch.eye(rank, dtype=torch.float64))
    assert found.errors[0] == 1
    assert float(found.errors[7]) == pytest.approx(fit(collected(x, y)).error)


def test_channel_decomposition_at_full_rank_changes_nothing() -> None:
    x, _ = responses()
    left, right, intercept = reduced_rank(collected(x, x)).fit(7)
    torch.testing.assert_close(left @ right, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(intercept, torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-9)


def test_responses_of_lower_rank_need_no_more() -> None:
    """Behind another decomposition the responses span less than all outputs; nothing is divided by zero."""
    x = normal(300, 3) @ normal(3, 7, seed=1)
    found = reduced_rank(collected(x, x))
    assert found.right.shape == (3, 7)
    assert float(found.errors[3]) < 1e-12
    left, right, intercept = found.fit(3)
    torch.testing.assert_close(x @ left @ right + intercept, x)
    with pytest.raises(ValueError, match="from 1 to 3, not 4"):
        found.fit(4)


def test_whitener_leaves_out_what_rounding_made() -> None:
    x = (normal(300, 3) @ normal(3, 7, seed=1)).float()
    moments = collected(x, x)
    basis = whitener(moments.xx, moments.precision)
    assert basis.shape == (7, 3)
    torch.testing.assert_close(basis.T @ moments.xx @ basis, torch.eye(3, dtype=torch.float64))
    assert whitener(torch.zeros(3, 3, dtype=torch.float64), 0.0).shape == (3, 0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), ()])
def test_a_channel_pair_is_the_layer_behind_its_map(kernel: tuple[int, ...], with_bias: bool) -> None:
    weight, bias = normal(7, 4, *kernel), normal(7, seed=5) if with_bias else None
    x = normal(9, 4, *(6 for _ in kernel), seed=6)
    layer = F.conv2d if kernel else F.linear
    before = layer(x, weight, bias)
    last = before.movedim(1, -1)
    rows = last.reshape(-1, 7)
    wanted = rows + normal(len(rows), 7, seed=7)
    left, right, intercept = reduced_rank(collected(rows, wanted)).fit(2)
    first, second, second_bias = channel_pair(weight, bias, left, right, intercept)
    assert first.shape == (2, 4, *kernel)
    after = layer(layer(x, first), second, second_bias)
    torch.testing.assert_close(after.movedim(1, -1), last @ left @ right + intercept)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_fact_16_merging_keeps_the_outputs(biases: tuple[bool, bool]) -> None:
    weight, pointwise = normal(5, 4, 1, 3), normal(6, 5, 1, 1, seed=1)
    first, second = normal(5, seed=2) if biases[0] else None, normal(6, seed=3) if biases[1] else None
    x = normal(2, 4, 5, 7, seed=4)
    merged, bias = merge_pointwise(weight, first, pointwise, second)
    expected = F.conv2d(F.conv2d(x, weight, first), pointwise, second)
    torch.testing.assert_close(F.conv2d(x, merged, bias), expected)
    assert (bias is None) == (biases == (False, False))


@given(inner=st.integers(1, 40), outputs=st.integers(1, 60), width=st.sampled_from([1, 3, 5]))
def test_fact_16_merging_pays_exactly_when_it_costs_no_more(inner: int, outputs: int, width: int) -> None:
    pays = merging_pays(torch.empty(inner, inner, 1, width), torch.empty(outputs, inner, 1, 1))
    assert pays == (width * inner >= (width - 1) * outputs)
