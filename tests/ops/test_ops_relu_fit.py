"""Fits behind a ReLU against a grid, against linear fits, and where ReLU does nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersenet.ops.gram import Moments, StatisticsError
from tersenet.ops.least_squares import fit
from tersenet.ops.low_rank import reduced_rank
from tersenet.ops.relu_fit import relu_fit, relu_step


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(count: int = 1500, shift: float = -1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that are left, the layer's weights for them, and outputs that also read inputs that are gone."""
    x, weight = normal(count, 12), normal(8, 18, seed=1)
    return x, weight[:, :12], torch.cat([x, normal(count, 6, seed=2)], 1) @ weight.T + shift


def collected(x: Tensor, y: Tensor) -> Moments:
    moments = Moments("conv", x.shape[1], y.shape[1])
    moments.add(x, y)
    return moments


def relu_share(y: Tensor, predicted: Tensor) -> float:
    wanted = y.relu()
    return float((wanted - predicted.relu()).square().sum() / (wanted - wanted.mean(0)).square().sum())


@given(
    prediction=st.floats(-5, 5),
    wanted=st.one_of(st.just(0.0), st.floats(0, 5)),
    coupling=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
)
def test_fact_15_the_step_is_never_worse_than_a_grid(prediction: float, wanted: float, coupling: float) -> None:
    def cost(u: Tensor) -> Tensor:
        return (u.relu() - wanted).square() + coupling * (u - prediction).square()

    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    step = relu_step(torch.tensor(prediction).double(), torch.tensor(wanted).double(), coupling)
    assert float(cost(step)) <= float(cost(grid).min()) + 1e-9


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fact_15_objective_falls_and_the_fit_is_better_than_the_linear_one(
    rank: int | None, dtype: torch.dtype
) -> None:
    x, _, y = (values.to(dtype) for values in layer())
    found = relu_fit("conv", x, y, rank=rank)
    assert len(found.objectives) == 50
    for part in (found.objectives[:30], found.objectives[30:]):
        assert all(after <= before * (1 + 1e-6) for before, after in pairwise(part))
        assert part[-1] < part[0]
    x, y = x.double(), y.double()
    if rank is None:
        linear = fit(collected(x, y))
        start = x @ linear.weight.T + linear.bias
    else:
        left, right, intercept = reduced_rank(collected(x, y)).fit(rank)
        start = x @ left @ right + intercept
    assert found.linear_error == pytest.approx(relu_share(y, start), rel=1e-5)
    assert found.error == pytest.approx(relu_share(y, x @ found.weight.T + found.bias), rel=1e-5)
    assert found.error < 0.97 * found.linear_error


@settings(deadline=None, max_examples=10)
@given(count=st.integers(1, 40), rank=st.sampled_from([None, 1, 5]), shift=st.sampled_from([-30.0, 0.0, 30.0]))
def test_fact_15_never_worse_than_linear_also_with_few_rows(count: int, rank: int | None, shift: float) -> None:
    x, _, y = layer(count, shift)
    found = relu_fit("conv", x, y, rank=rank, schedule=((0.1, 5), (1.0, 5)))
    assert found.error <= found.linear_error
    assert found.weight.isfinite().all()
    assert found.bias.isfinite().all()


def test_rank_and_factors() -> None:
    x, _, y = layer()
    found = relu_fit("conv", x, y, rank=3)
    assert (found.left.shape, found.right.shape) == ((12, 3), (3, 8))
    assert int(torch.linalg.matrix_rank(found.weight)) == 3
    errors = [relu_fit("conv", x, y, rank=rank, schedule=((0.1, 10),)).error for rank in (1, 3, 5, 8)]
    assert errors == sorted(errors, reverse=True)
    full = relu_fit("conv", x, y, schedule=((0.1, 10),))
    assert errors[-1] == pytest.approx(full.error, rel=1e-9)


def test_where_all_outputs_are_positive_it_is_the_linear_fit() -> None:
    x, _, y = layer(shift=200.0)
    found, linear = relu_fit("conv", x, y), fit(collected(x, y))
    torch.testing.assert_close(found.weight, linear.weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.bias, linear.bias, rtol=1e-6, atol=1e-6)


def test_an_untouched_layer_stays_as_it_is() -> None:
    x, weight, _ = layer()
    y = x @ weight.T - 1
    found = relu_fit("conv", x, y, prior=weight)
    torch.testing.assert_close(found.weight, weight)
    torch.testing.assert_close(found.bias, torch.full((8,), -1.0, dtype=torch.float64))
    assert found.error < 1e-20


def test_the_bias_belongs_to_the_threshold() -> None:
    """Bug 2 of the published code: without its bias, another part of the outputs seems to be cut off."""
    x, _, y = layer(shift=-3.0)
    right, wrong = relu_fit("conv", x, y), relu_fit("conv", x, y + 3)
    assert right.error < relu_share(y, x @ wrong.weight.T + wrong.bias - 3)


def test_prior_decides_where_no_row_varies() -> None:
    x, weight, _ = layer()
    x[:, 3], x[:, 5] = 0.7, x[:, 4]
    y = x @ weight.T
    found = relu_fit("conv", x, y, prior=weight)
    torch.testing.assert_close(found.weight, weight)
    other = x.clone()
    other[:, 3] += 1
    torch.testing.assert_close(other @ found.weight.T + found.bias, other @ weight.T)
    assert relu_fit("conv", x, y).weight[:, 3].abs().max() < 1e-9


def test_dead_outputs_and_constant_inputs() -> None:
    x, _, y = layer()
    dead = relu_fit("conv", x, -y.abs() - 0.1)
    assert dead.error == pytest.approx(0, abs=1e-2)
    constant = relu_fit("conv", torch.full_like(x, 0.3), y)
    assert constant.weight.eq(0).all()
    assert constant.error <= constant.linear_error


def test_bad_input_is_refused_by_name() -> None:
    x, weight, y = layer()
    with pytest.raises(StatisticsError, match="'conv7' has seen no"):
        relu_fit("conv7", x[:0], y[:0])
    with pytest.raises(StatisticsError, match="target outputs of 'conv7'"):
        relu_fit("conv7", x, y / 0)
    wrong: tuple[dict[str, Any], ...] = ({"rank": 0}, {"rank": 2, "prior": weight})
    for arguments in wrong:
        with pytest.raises(ValueError, match="conv7"):
            relu_fit("conv7", x, y, **arguments)
    with pytest.raises(ValueError, match="conv7"):
        relu_fit("conv7", x[:5], y)


def test_a_ridge_pulls_to_the_prior() -> None:
    """Without a ReLU in play it is the ridge regression of `least_squares.fit`; a large one gives the prior."""
    torch.manual_seed(0)
    x, prior = torch.randn(40, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    y = x @ torch.randn(6, 3, dtype=torch.float64) + 50
    moments = Moments("layer", 6, 3)
    moments.add(x, y)
    for ridge in (0.0, 0.3):
        wanted = fit(moments, prior=prior, ridge=ridge)
        found = relu_fit("layer", x, y, prior=prior, ridge=ridge)
        torch.testing.assert_close(found.weight, wanted.weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(relu_fit("layer", x, y, prior=prior, ridge=1e6).weight, prior, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="layer"):
        relu_fit("layer", x, y, ridge=0.1)
