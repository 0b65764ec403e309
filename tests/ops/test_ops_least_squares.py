"""Fits from moments against numpy and scikit-learn on the raw rows, and what must hold where rows don't suffice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor

from tersenet.ops.gram import Moments, StatisticsError
from tersenet.ops.least_squares import channel_columns, error_curve, error_of, factor, fit

TAPS = 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(count: int = 300, channels: int = 8, outputs: int = 5, noise: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """Rows behind a ReLU whose channels say much of each other, a weight (O, C * taps), wanted outputs with a bias."""
    x = (normal(count, 6) @ normal(6, channels * TAPS, seed=1) + 0.5 * normal(count, channels * TAPS, seed=2)).relu()
    weight = normal(outputs, channels * TAPS, seed=3)
    return x, weight, x @ weight.T + noise * normal(count, outputs, seed=4) + torch.arange(outputs)


def collected(x: Tensor, y: Tensor) -> Moments:
    moments = Moments("conv3", x.shape[1], y.shape[1])
    moments.add(x, y)
    return moments


def share(y: Tensor, predicted: Tensor) -> float:
    return float((y - predicted).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("kept", [None, [1, 2, 5], [7]])
@pytest.mark.parametrize("with_prior", [False, True])
def test_agrees_with_least_squares_on_all_rows(kept: list[int] | None, with_prior: bool) -> None:
    x, weight, y = layer()
    columns = None if kept is None else channel_columns(torch.tensor(kept), TAPS)
    chosen = x if columns is None else x[:, columns]
    prior = (weight if columns is None else weight[:, columns]) if with_prior else None
    found = fit(collected(x, y), columns, prior=prior)
    oracle = LinearRegression().fit(chosen.numpy(), y.numpy())
    torch.testing.assert_close(found.weight, torch.from_numpy(oracle.coef_), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.bias, torch.from_numpy(oracle.intercept_), rtol=1e-8, atol=1e-8)
    raw = np.linalg.lstsq(np.c_[chosen.numpy(), np.ones(len(x))], y.numpy(), rcond=None)[0]
    torch.testing.assert_close(found.weight, torch.from_numpy(raw[:-1].T), rtol=1e-8, atol=1e-8)
    assert found.error == pytest.approx(share(y, chosen @ found.weight.T + found.bias), rel=1e-8)
    assert (found.ridge, found.notice) == (0, None)


def test_a_ridge_is_scikit_learns() -> None:
    x, _, y = layer()
    moments = collected(x, y)
    found = fit(moments, ridge=0.1)
    oracle = Ridge(alpha=found.ridge).fit(x.numpy(), y.numpy())
    assert found.ridge == pytest.approx(0.1 * float(moments.xx.diagonal().mean()))
    torch.testing.assert_close(found.weight, torch.from_numpy(oracle.coef_))
    torch.testing.assert_close(found.bias, torch.from_numpy(oracle.intercept_))
    assert found.error == pytest.approx(share(y, x @ found.weight.T + found.bias))
    assert found.notice is None


def test_fact_6_all_channels_of_an_untouched_network_change_nothing() -> None:
    x, weight, y = layer(noise=0)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        found = fit(collected(x.to(dtype), y.to(dtype)), prior=weight)
        torch.testing.assert_close(found.weight, weight, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.bias, torch.arange(5.0).double(), rtol=0, atol=10 * tolerance)
        change = x @ (found.weight - weight).T + found.bias - torch.arange(5)
        assert float(change.norm() / y.norm()) < tolerance
        assert found.error < (1e-6 if dtype == torch.float32 else 1e-12)


def test_fact_6_holds_with_fewer_rows_than_weights_too() -> None:
    """Without a prior, 20 rows can't tell the weights of 32 inputs; with it nothing is lost on other rows either."""
    x, weight, y = layer(count=20, noise=0)
    found = fit(collected(x, y), prior=weight)
    torch.testing.assert_close(found.weight, weight, rtol=1e-6, atol=1e-6)
    assert found.ridge > 0
    assert found.notice is not None
    for part in ("'conv3'", "20 calibration rows", "32 weights", "At least 33 rows"):
        assert part in found.notice


@settings(deadline=None, max_examples=30)
@given(count=st.integers(2, 60), kept=st.sets(st.integers(0, 7), min_size=1), ridge=st.sampled_from([0.0, 1e-3, 1.0]))
def test_fact_8_refitting_is_never_worse_than_leaving_the_weights(count: int, kept: set[int], ridge: float) -> None:
    x, weight, y = layer(count)
    columns = channel_columns(torch.tensor(sorted(kept)), TAPS)
    moments, prior = collected(x, y), weight[:, columns]
    found, left = fit(moments, columns, prior=prior, ridge=ridge), error_of(moments, prior, columns)
    predicted = x[:, columns] @ prior.T
    assert left == pytest.approx(share(y, predicted + (y - predicted).mean(0)), rel=1e-6)
    assert found.error <= left + 1e-12
    assert found.error == pytest.approx(share(y, x[:, columns] @ found.weight.T + found.bias), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 6]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fact_8_residuals_are_orthogonal_to_the_inputs_and_have_no_mean(dtype: torch.dtype, kept: list[int]) -> None:
    x, _, y = (values.to(dtype) for values in layer(2000))
    columns = channel_columns(torch.tensor(kept), TAPS)
    found = fit(collected(x, y), columns)
    x, y = x[:, columns].double(), y.double()
    missed = y - x @ found.weight.T - found.bias
    assert float((x.T @ missed).norm() / (x.T @ y).norm()) <= 1e-5
    assert (missed.mean(0).abs() <= 1e-5 * y.std(0)).all()


def test_fact_9_the_intercept_is_the_new_bias() -> None:
    x, weight, y = layer()
    constant = torch.tensor([3.0, -2.0, 0.0, 100.0, 1.0], dtype=torch.float64)
    columns = channel_columns(torch.tensor([0, 3, 4]), TAPS)
    plain = fit(collected(x, y), columns, prior=weight[:, columns])
    moved = fit(collected(x, y + constant), columns, prior=weight[:, columns])
    torch.testing.assert_close(moved.weight, plain.weight)
    torch.testing.assert_close(moved.bias, plain.bias + constant)


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(1e-4, 1e4), shift=st.floats(-10, 10))
def test_scaling_and_shifting_the_inputs_changes_no_output(scale: float, shift: float) -> None:
    x, _, y = layer()
    plain, moved = fit(collected(x, y)), fit(collected(x * scale + shift, y))
    torch.testing.assert_close((x * scale + shift) @ moved.weight.T + moved.bias, x @ plain.weight.T + plain.bias)
    assert moved.error == pytest.approx(plain.error, rel=1e-6)


def test_fact_7_dead_channels_cost_nothing_and_keep_their_weights() -> None:
    x, weight, y = layer(noise=0)
    x[:, 8:16] = 0.0
    y = x @ weight.T
    moments = collected(x, y)
    alive = channel_columns(torch.tensor([0, 1, 4, 5, 6, 7]), TAPS)
    assert fit(moments, alive, prior=weight[:, alive]).error <= 1e-5
    found = fit(moments, prior=weight)
    torch.testing.assert_close(found.weight, weight, rtol=1e-6, atol=1e-6)
    assert "constant or linearly dependent" in str(found.notice)


def test_fact_7_a_duplicate_can_go() -> None:
    x, weight, y = layer(noise=0)
    x[:, 8:12] = x[:, 24:28]
    y = x @ weight.T + 2
    moments = collected(x, y)
    without = channel_columns(torch.tensor([0, 1, 3, 4, 5, 6, 7]), TAPS)
    found = fit(moments, without, prior=weight[:, without])
    assert found.error <= 1e-8
    assert found.ridge == 0
    torch.testing.assert_close(x[:, without] @ found.weight.T + found.bias, y)
    both = fit(moments, prior=weight)
    torch.testing.assert_close(x @ both.weight.T + both.bias, y, rtol=1e-6, atol=1e-5)
    assert both.ridge > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fact_10_one_factorisation_gives_the_error_of_every_count(dtype: torch.dtype) -> None:
    x, _, y = (values.to(dtype) for values in layer(2000))
    moments, order = collected(x, y), torch.tensor([4, 2, 7, 0, 1, 6, 3, 5])
    curve = error_curve(moments, order, TAPS)
    assert curve[0] == 1
    assert (curve[1:] <= curve[:-1]).all()
    for count in range(1, 9):
        assert float(curve[count]) == pytest.approx(
            fit(moments, channel_columns(order[:count], TAPS)).error, rel=1e-4, abs=1e-7
        )
    torch.testing.assert_close(error_curve(moments, order[:3], TAPS), curve[:4])


def test_curve_with_dead_and_duplicate_channels_and_too_few_rows() -> None:
    x, weight, _ = layer()
    x[:, 0:4], x[:, 8:12] = 0.0, x[:, 24:28]
    y = x @ weight.T
    curve = error_curve(collected(x, y), torch.arange(8), TAPS)
    assert curve[1] == 1
    assert curve[6] > 1e-3
    assert float(curve[7]) == pytest.approx(float(curve[6]), abs=1e-4) or curve[7] < curve[6]
    assert curve[8] < 1e-4
    few = error_curve(collected(x[:10], y[:10]), torch.arange(8), TAPS)
    assert (few[1:] <= few[:-1]).all()
    assert 0 <= float(few[-1]) < 1e-4


@pytest.mark.parametrize("corrupted", [0.0, 0.3])
def test_fact_17_the_target_of_a_branch_makes_up_for_its_shortcut(corrupted: float) -> None:
    """Block output = shortcut + branch. The corrected target adds what the shortcut has lost at the same positions."""
    x, weight, branch = layer(1000)
    shortcut = normal(1000, 5, seed=7)
    # The shortcut's error can be told in part from the branch's inputs.
    current = shortcut + corrupted * (x[:, :5] + normal(1000, 5, seed=8))
    wanted = branch + (shortcut - current)
    columns = channel_columns(torch.tensor([0, 1, 2, 5, 6]), TAPS)
    naive = fit(collected(x, branch), columns, prior=weight[:, columns])
    corrected = fit(collected(x, wanted), columns, prior=weight[:, columns])
    missed = [
        float((shortcut + branch - current - x[:, columns] @ f.weight.T - f.bias).square().sum())
        for f in (naive, corrected)
    ]
    if corrupted:
        assert missed[1] < 0.97 * missed[0]
    else:
        assert torch.equal(corrected.weight, naive.weight)
        assert torch.equal(corrected.bias, naive.bias)


def test_constant_activations_are_named() -> None:
    x, weight, y = layer()
    constant = fit(collected(torch.full_like(x, 0.3), y), prior=weight)
    assert "'conv3': its inputs are constant" in str(constant.notice)
    torch.testing.assert_close(x.new_full((1, 32), 0.3) @ constant.weight.T + constant.bias, y.mean(0, keepdim=True))
    flat = fit(collected(x, torch.ones_like(y)))
    assert "'conv3': its target outputs are constant" in str(flat.notice)
    assert flat.error == 0
    torch.testing.assert_close(x @ flat.weight.T + flat.bias, torch.ones_like(y))
    assert error_curve(collected(x, torch.ones_like(y)), torch.arange(8), TAPS).eq(0).all()


def test_no_rows_and_a_wrong_prior_are_refused() -> None:
    with pytest.raises(StatisticsError, match="'empty' has seen no calibration data"):
        fit(Moments("empty", 4, 2))
    x, weight, y = layer()
    with pytest.raises(ValueError, match="a prior of shape"):
        fit(collected(x, y), torch.arange(8), prior=weight)


def test_factor_says_what_it_added() -> None:
    full = normal(50, 6)
    full = full.T @ full
    triangle, added = factor(full.clone, 1e-16)
    assert added == 0
    torch.testing.assert_close(triangle @ triangle.T, full)
    low = normal(50, 3) @ normal(3, 6, seed=1)
    triangle, added = factor(lambda: low.T @ low, 1e-16)
    assert added == pytest.approx(1e-6 * float((low.T @ low).diagonal().mean()))
    torch.testing.assert_close(triangle @ triangle.T, low.T @ low + added * torch.eye(6))
    # Not positive: rounding in float32 can do this; the ridge grows until it is.
    _, added = factor(lambda: torch.diag(torch.tensor([1.0, 1.0, -1e-3], dtype=torch.float64)), 1e-7)
    assert added > 1e-3
