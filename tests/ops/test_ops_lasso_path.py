"""Contributions and the path over them against scikit-learn on the expanded design, and at ties and dead channels."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso, lars_path_gram
from torch import Tensor

from tersenet.ops.contributions import Contributions, contributions, summed
from tersenet.ops.gram import Moments, StatisticsError
from tersenet.ops.lasso_path import LassoPath, lasso_path


def layer(
    channels: int = 9, taps: int = 4, outputs: int = 3, count: int = 60, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (N, C * taps) behind a ReLU, a weight (O, C, taps), and outputs that a little noise comes to."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    latent = normal(count, 1 + channels // 2) @ normal(1 + channels // 2, channels * taps)
    x = (latent + 0.5 * normal(count, channels * taps)).relu()
    weight = normal(outputs, channels, taps) * normal(channels, 1).exp()
    return x, weight, x @ weight.flatten(1).T + 0.3 * normal(count, outputs) + 1


def expanded(x: Tensor, weight: Tensor) -> Tensor:
    """(N * O, C): the published code's design, centred per output."""
    _, channels, taps = weight.shape
    z = torch.einsum("nca,oca->noc", x.view(len(x), channels, taps), weight)
    return (z - z.mean(0)).reshape(-1, channels)


def collected(x: Tensor, y: Tensor) -> Moments:
    moments = Moments("conv", x.shape[1], y.shape[1])
    moments.add(x, y)
    return moments


def path_of(design: Tensor, target: Tensor) -> LassoPath:
    return lasso_path(
        Contributions(design.T @ design, design.T @ target, float(target @ target), torch.finfo(torch.float64).eps)
    )


def assert_optimal(path: LassoPath, gram: Tensor, target: Tensor) -> int:
    """Fact 3, the optimality conditions, at every number of channels that has a penalty; says how many have."""
    found, rounding = 0, 1e-12 * float(target.abs().max())
    for count in range(path.channels + 1):
        penalty, scales, support = float(path.penalties[count]), path.scales[count], path.supports[count]
        assert int(support.sum()) == count
        if penalty > 0:
            pull = target - gram @ scales
            assert (scales[~support] == 0).all()
            assert (pull[~support].abs() <= penalty * (1 + 1e-6) + rounding).all()
            assert ((pull.abs() - penalty)[support].abs() <= 1e-5 * penalty + rounding).all()
            assert (pull * scales >= -rounding).all()
            found += 1
    return found


@pytest.mark.parametrize(("channels", "taps"), [(9, 4), (7, 1), (130, 9)])
def test_fact_2_contributions_are_those_of_the_expanded_design(channels: int, taps: int) -> None:
    x, weight, y = layer(channels, taps)
    design, target = expanded(x, weight), (y - y.mean(0)).flatten()
    parts = contributions(collected(x, y), weight.unflatten(2, (1, taps)))
    torch.testing.assert_close(parts.gram, design.T @ design)
    torch.testing.assert_close(parts.target, design.T @ target)
    assert parts.energy == pytest.approx(float(target @ target))
    assert torch.equal(parts.gram, parts.gram.T)


def test_fact_2_with_float32_rows() -> None:
    x, weight, y = (values.float() for values in layer(16, 9, 8, 3000))
    design = expanded(x.double(), weight.double())
    gram = contributions(collected(x, y), weight).gram
    assert float((gram - design.T @ design).norm() / gram.norm()) < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_facts_3_and_4_supports_and_coefficients_are_scikit_learns_on_the_raw_design(seed: int) -> None:
    x, weight, y = layer(12, 4, 3, 80, seed)
    design, target = expanded(x, weight), (y - y.mean(0)).flatten()
    parts = contributions(collected(x, y), weight)
    path = lasso_path(parts)
    assert assert_optimal(path, parts.gram, parts.target) == 13
    for count in range(1, 13):
        alpha = float(path.penalties[count]) / len(target)
        oracle = Lasso(alpha, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(design, target)
        assert oracle.coef_.nonzero()[0].tolist() == path.kept(count).tolist()
        torch.testing.assert_close(path.scales[count], torch.from_numpy(oracle.coef_), rtol=1e-4, atol=1e-6)


def test_fact_4_a_path_that_drops_channels_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(500, 20, generator=generator, dtype=torch.float64)
    design = latent @ torch.randn(20, 60, generator=generator, dtype=torch.float64)
    design += 0.3 * torch.randn(500, 60, generator=generator, dtype=torch.float64)
    target = design.sum(1)
    path = path_of(design, target)
    penalties, _, scales = lars_path_gram(
        (design.T @ target).numpy(), Gram=(design.T @ design).numpy(), n_samples=1, method="lasso", max_iter=1000
    )
    assert len(penalties) > 61, "no channel was ever dropped: this tests nothing"
    first: dict[int, list[int]] = {}
    for knot in range(scales.shape[1] - 1):
        support = (scales[:, knot] + scales[:, knot + 1]).nonzero()[0].tolist()
        first.setdefault(len(support), support)
    assert [path.kept(k).tolist() for k in range(1, 61)] == [first[k] for k in range(1, 61)]
    nested = [set(path.order[:k].tolist()) == set(path.kept(k).tolist()) for k in range(61)]
    assert not all(nested)
    assert sum(nested) > 5


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), channels=st.integers(1, 8), data=st.data())
def test_fact_5_any_count_is_met_whatever_ties_or_is_dead(seed: int, channels: int, data: st.DataObject) -> None:
    """Small whole numbers make exact ties, duplicates, opposites, sums of others and dead channels all the time."""
    numbers = st.lists(st.integers(-1, 1), min_size=channels * 6, max_size=channels * 6)
    design = torch.tensor(data.draw(numbers), dtype=torch.float64).view(6, channels)
    target = torch.randint(-3, 4, (6,), generator=torch.Generator().manual_seed(seed)).double()
    path = path_of(design, target)
    assert_optimal(path, design.T @ design, design.T @ target)
    for count in range(channels + 1):
        kept = path.kept(count).tolist()
        assert len(kept) == count
        assert kept == sorted(set(kept))
    assert sorted(path.order.tolist()) == list(range(channels))
    # All that the design can say is said at the end of the path.
    rank = int(torch.linalg.matrix_rank(design))
    if (design.T @ target).any():
        best = design @ torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution[:, 0]
        chosen = design[:, path.kept(min(rank, channels))]
        if int(torch.linalg.matrix_rank(chosen)) == rank:
            again = chosen @ torch.linalg.lstsq(chosen, target[:, None], driver="gelsd").solution[:, 0]
            torch.testing.assert_close(again, best)


@pytest.mark.parametrize("seed", [121, 263, 350, 1105, 1144, 1653])
def test_fact_3_holds_where_several_channels_join_and_leave_at_once(seed: int) -> None:
    """A channel that just left may have to join again at once, or at the other end of the very same stretch."""
    generator = torch.Generator().manual_seed(seed)
    channels = int(torch.randint(2, 9, (1,), generator=generator))
    design = torch.randint(-1, 2, (6, channels), generator=generator).double()
    target = torch.randint(-3, 4, (6,), generator=generator).double()
    assert assert_optimal(path_of(design, target), design.T @ design, design.T @ target) > 4


def test_fact_5_two_runs_have_the_same_bits() -> None:
    x, weight, y = layer(40, 4, 5, 300)
    first, again = (lasso_path(contributions(collected(x, y), weight)) for _ in range(2))
    for name in ("supports", "penalties", "scales"):
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_all_channels_and_none() -> None:
    x, weight, y = layer()
    path = lasso_path(contributions(collected(x, y), weight))
    assert path.kept(9).tolist() == list(range(9))
    assert path.kept(0).tolist() == []
    for count in (-1, 10):
        with pytest.raises(ValueError, match=f"can't keep {count} of 9"):
            path.kept(count)


def test_fact_7_dead_channels_come_last_and_are_never_kept_before() -> None:
    x, weight, y = layer()
    dead = [1, 4, 8]
    for channel in dead:
        x[:, channel * 4 : channel * 4 + 4] = 0.7 if channel == 4 else 0.0
    path = lasso_path(contributions(collected(x, y), weight))
    for count in range(1, 7):
        assert not set(path.kept(count).tolist()) & set(dead)
    assert path.order[-3:].tolist() == dead
    assert path.kept(7).tolist() == [0, 1, 2, 3, 5, 6, 7]


def test_fact_7_a_duplicate_waits_until_all_others_are_in() -> None:
    x, weight, y = layer()
    x[:, 20:24], weight[:, 5] = x[:, 8:12], weight[:, 2]
    y = x @ weight.flatten(1).T
    parts = contributions(collected(x, y), weight)
    path = lasso_path(parts)
    assert path.kept(8).tolist() == [0, 1, 2, 3, 4, 6, 7, 8]
    assert assert_optimal(path, parts.gram, parts.target) == 9


@pytest.mark.parametrize("seed", range(10))
def test_the_path_stays_optimal_when_duplicates_wait(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    design = torch.randn(100, 12, generator=generator, dtype=torch.float64)
    design[:, 7], design[:, 9] = design[:, 2], -2 * design[:, 4]
    target = design @ torch.rand(12, generator=generator, dtype=torch.float64)
    target += torch.randn(100, generator=generator, dtype=torch.float64)
    path = path_of(design, target)
    assert assert_optimal(path, design.T @ design, design.T @ target) == 11
    assert {2, 7} - set(path.kept(10).tolist())
    assert {4, 9} - set(path.kept(10).tolist())


def test_no_channel_says_anything() -> None:
    path = path_of(torch.zeros(5, 3, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    assert [path.kept(k).tolist() for k in range(4)] == [[], [0], [0, 1], [0, 1, 2]]
    constant = path_of(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert constant.kept(2).tolist() == [0, 1]


@settings(deadline=None, max_examples=20)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 100))
def test_scales_and_the_order_of_channels_do_not_matter(scale: float, seed: int) -> None:
    x, weight, y = layer(seed=seed)
    path = lasso_path(contributions(collected(x, y), weight))
    scaled = lasso_path(contributions(collected(x * scale, y), weight / scale))
    shifted = lasso_path(contributions(collected(x + 3, y - 5), weight))
    flip = torch.arange(8, -1, -1)
    flipped = lasso_path(
        contributions(collected(x.view(-1, 9, 4)[:, flip].flatten(1), y), weight[:, flip].contiguous())
    )
    assert torch.equal(scaled.supports, path.supports)
    assert torch.equal(shifted.supports, path.supports)
    assert torch.equal(flipped.supports[:, flip], path.supports)


def test_units_of_several_channels_and_channels_that_always_stay() -> None:
    x, weight, y = layer()
    units = torch.tensor([0, 1, 2, -1, 0, 1, 2, 3, -1])
    parts = contributions(collected(x, y), weight).of_units(units, 4)
    design = expanded(x, weight)
    summed_up = torch.stack([design[:, units == unit].sum(1) for unit in range(4)], 1)
    rest = (y - y.mean(0)).flatten() - design[:, units < 0].sum(1)
    torch.testing.assert_close(parts.gram, summed_up.T @ summed_up)
    torch.testing.assert_close(parts.target, summed_up.T @ rest)
    assert parts.energy == pytest.approx(float(rest @ rest))


def test_two_consumers_count_alike_whatever_their_scale() -> None:
    (x, first, y), (_, second, _) = layer(), layer(seed=1, outputs=5)
    other = x @ second.flatten(1).T
    one, two = contributions(collected(x, y), first), contributions(collected(x, other), second)
    loud = contributions(collected(x, 1000 * other), 1000 * second)
    torch.testing.assert_close(summed([one, two]).gram, summed([one, loud]).gram)
    torch.testing.assert_close(summed([one, two]).target, one.target / one.energy + two.target / two.energy)
    assert torch.equal(lasso_path(summed([one])).supports, lasso_path(one).supports)
    constant = Contributions(one.gram, one.target, 0.0, one.precision)
    torch.testing.assert_close(summed([one, constant]).gram, one.gram / one.energy)


def test_weights_that_do_not_fit_are_refused() -> None:
    x, weight, y = layer()
    moments = collected(x, y)
    with pytest.raises(ValueError, match="does not fit moments of 36 inputs and 3 outputs"):
        contributions(moments, weight[:, :8])
    weight[0, 0, 0] = float("nan")
    with pytest.raises(StatisticsError, match="weight of 'conv' holds"):
        contributions(moments, weight)


def test_fewer_rows_than_channels_end_where_rounding_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows of two outputs span 126 directions; behind them only rounding errors of float32 are left, among which
    channels would join and leave for ever."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 256, generator=generator).relu(), torch.randn(2, 256, generator=generator)
    knots, next_knot = 0, importlib.import_module("tersenet.ops.lasso_path")._Homotopy._next_knot

    def counted(*given: Any) -> Any:
        nonlocal knots
        knots += 1
        return next_knot(*given)

    monkeypatch.setattr("tersenet.ops.lasso_path._Homotopy._next_knot", counted)
    path = lasso_path(contributions(collected(x, x @ weight.T), weight[..., None, None]))
    assert path.supports.sum(1).tolist() == list(range(257))
    assert 100 < int((path.penalties > 0).sum()) <= 130
    assert knots < 1000
