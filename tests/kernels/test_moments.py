"""Second moments on matrix tiles against float64: sizes, scales, means that move, threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersenet.kernels.moments_call import ROWS, TileMoments, usable

pytestmark = pytest.mark.skipif(not usable(), reason="this processor has no matrix tiles of bytes")


def collected(x: Tensor, block: int = ROWS) -> TileMoments:
    moments = TileMoments(x.shape[1])
    for start in range(0, len(x), block):
        part = x[start : start + block]
        moments.rows[: len(part)] = part
        moments.add(len(part), start)
    return moments


def error(moments: TileMoments, x: Tensor) -> Tensor:
    """On and below the diagonal, in units of the two columns' norms; a column without deviations must have zeros."""
    x = x.double()
    apart = x - x.mean(0)
    exact = apart.T @ apart
    norms = exact.diagonal().sqrt()
    sizes = norms[:, None] * norms
    assert moments.sums[sizes == 0].eq(0).all()
    return ((moments.sums - exact) / sizes.where(sizes > 0, 1)).tril()


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 400),
    columns=st.integers(1, 140),
    block=st.sampled_from([7, 64, 65, ROWS]),
    mean=st.sampled_from([0.0, 1.0, 100.0]),
    drift=st.sampled_from([0.0, 3.0]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 2**32),
)
@example(rows=3 * ROWS + 7, columns=300, block=ROWS, mean=1.0, drift=1e-3, scale=1.0, seed=0)  # units of several groups
def test_equals_float64(
    rows: int, columns: int, block: int, mean: float, drift: float, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator).relu() * torch.randn(columns, generator=generator).exp()
    x = scale * (x + mean + drift * torch.arange(rows)[:, None])
    moments = collected(x, block)
    assert float(error(moments, x).abs().max()) <= 3e-6 * (1 + mean / 10)
    torch.testing.assert_close(moments.means, x.double().mean(0), rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("kind", ["normal", "sparse", "heavy tails", "two values", "one row"])
def test_is_as_exact_as_products_in_float32(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2 * ROWS, 200, generator=generator)
    if kind == "sparse":
        x = (x - 1).relu()
    elif kind == "heavy tails":
        x = x.sign() * x.abs().exp()
    elif kind == "two values":
        x = (x > 0).float() * 0.3
    elif kind == "one row":
        x[1:] *= 1e-3
    wrong = error(collected(x), x)
    centred = torch.cat([part - part.mean(0) for part in x.double().split(ROWS)]).float()
    norms = centred.double().norm(dim=0)
    plain = ((centred.T @ centred).double() - centred.double().T @ centred.double()) / (norms[:, None] * norms)
    assert float(wrong.square().mean()) ** 0.5 <= max(1.5e-7, 2 * float(plain.tril().square().mean()) ** 0.5)
    assert float(wrong.abs().max()) <= max(1e-6, 2 * float(plain.abs().max()))


def test_the_largest_digits_do_not_overflow() -> None:
    x = torch.ones(ROWS, 64)
    x[::2] = -1
    moments = collected(x)
    assert float(error(moments, x).abs().max()) < 3e-7
    assert torch.equal(moments.sums[:32, :32], moments.sums[32:, 32:])


def test_columns_without_deviations_and_with_the_smallest() -> None:
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1], x[:, 2] = 0.3, 1e-35 * x[:, 2]
    moments = collected(x)
    assert moments.sums[1, 1] < 1e-12
    assert moments.sums[2, :3].eq(0).all()
    torch.testing.assert_close(moments.means, x.double().mean(0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("share", [1e-3, 1e-4, 3e-5, 1e-5, 5e-6, 3e-6])
@pytest.mark.parametrize("kind", ["two values", "normal"])
def test_deviations_of_a_few_last_places_of_a_mean_do_not_overflow(share: float, kind: str) -> None:
    apart = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(0))
    x = 1 + share * (apart.sign() if kind == "two values" else apart)
    assert float(error(collected(x), x).abs().max()) <= 3e-6


def test_rows_left_from_a_longer_block_count_no_more() -> None:
    x = torch.randn(ROWS + 5, 40, generator=torch.Generator().manual_seed(0))
    x[:ROWS] *= 1e6
    moments = collected(x)
    alone = TileMoments(40)
    alone.rows[:5] = x[ROWS:]
    alone.rows[5:] = 7.0
    alone.add(5, 0)
    assert float(error(alone, x[ROWS:]).abs().max()) < 1e-6
    assert float(error(moments, x).abs().max()) < 1e-6


def test_threads_change_no_bit() -> None:
    x = torch.randn(ROWS + 300, 1500, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = collected(x)
        torch.set_num_threads(3)
        together = collected(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.means, together.means)
    assert torch.equal(alone.sums.tril(), together.sums.tril())
