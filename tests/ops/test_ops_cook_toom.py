"""Exact transforms: symbolically a correlation, and the matrices that are in the literature."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersenet.errors import TersenetError
from tersenet.ops.cook_toom import POINT_SETS, Matrix, Transforms, cook_toom, reference

SIZES = [(2, 3), (4, 3), (6, 3), (2, 5), (4, 5), (6, 5), (4, 7), (8, 3), (1, 3), (3, 1), (1, 1), (5, 2)]
NUMBERS = st.fractions(min_value=-5, max_value=5, max_denominator=6)


def correlate(transforms: Transforms, filter_: list[Fraction], tile: list[Fraction]) -> list[Fraction]:
    def times(matrix: Matrix, vector: list[Fraction]) -> list[Fraction]:
        return [sum((x * y for x, y in zip(row, vector, strict=True)), Fraction()) for row in matrix]

    products = [x * y for x, y in zip(times(transforms.g, filter_), times(transforms.bt, tile), strict=True)]
    return times(transforms.at, products)


def rows(text: str) -> Matrix:
    return tuple(tuple(map(Fraction, row.split())) for row in text.split(";"))


@pytest.mark.parametrize(("m", "r"), SIZES)
@pytest.mark.parametrize("points", POINT_SETS)
def test_every_named_set_is_exact(m: int, r: int, points: str) -> None:
    """W2: zero error in rational numbers."""
    try:
        made = cook_toom(m, r, points)
    except TersenetError:
        assert points == "reference" or len(POINT_SETS[points][-1]) < m + r - 2
        return
    filter_, tile = [Fraction(3 * j - 2, j + 2) for j in range(r)], [Fraction(5 - i * i, i + 1) for i in range(made.t)]
    expected = [sum((filter_[j] * tile[i + j] for j in range(r)), Fraction()) for i in range(m)]
    assert correlate(made, filter_, tile) == expected
    assert made.is_exact()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_points_and_any_scales_are_exact(data: st.DataObject) -> None:
    """W2: for points of any kind, and S_a S_g S_b = I preserves it."""
    m, r = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    made = cook_toom(m, r, data.draw(st.lists(NUMBERS, min_size=m + r - 2, max_size=m + r - 2, unique=True)))
    factors = st.lists(NUMBERS.filter(bool), min_size=made.t, max_size=made.t)
    scaled = made.rescaled(data.draw(factors), data.draw(factors))
    assert scaled.is_exact()
    broken = (tuple(x + 1 for x in scaled.bt[0]), *scaled.bt[1:])
    assert not Transforms(m, r, scaled.points, scaled.at, scaled.g, broken).is_exact()


def test_the_matrices_of_the_literature() -> None:
    f2, f4, f6 = cook_toom(2, 3), cook_toom(4, 3, "lavin"), cook_toom(6, 3, "lavin")
    assert f2.at == rows("1 1 1 0; 0 1 -1 1")
    assert f2.bt == rows("1 0 -1 0; 0 1 1 0; 0 -1 1 0; 0 -1 0 1")
    assert f4.g == rows("1/4 0 0; -1/6 -1/6 -1/6; -1/6 1/6 -1/6; 1/24 1/12 1/6; 1/24 -1/12 1/6; 0 0 1")
    assert f4.bt == rows("4 0 -5 0 1 0; 0 -4 -4 1 1 0; 0 4 -4 -1 1 0; 0 -2 -1 2 1 0; 0 2 -1 -2 1 0; 0 4 0 -5 0 1")
    assert f6.g[3:6] == rows("1/90 1/45 2/45; 1/90 -1/45 2/45; 32/45 16/45 8/45")
    assert f6.bt[1] == rows("0 1 1 -17/4 -17/4 1 1 0")[0]
    better = cook_toom(4, 3)
    assert better.at == rows("1 1 1 1 1 0; 0 1 -1 1/2 -2 0; 0 1 1 1/4 4 0; 0 1 -1 1/8 -8 1")
    assert better.g == rows("1 0 0; 1/3 1/3 1/3; -1/3 1/3 -1/3; -16/15 -8/15 -4/15; 1/15 -2/15 4/15; 0 0 1")
    assert cook_toom(2, 5, "lavin").bt == f4.bt


def test_the_reference_has_its_scales_and_is_a_convolution() -> None:
    """Defect of the reference: its F(6, 3) has the scales of three taps in the wrong order."""
    assert reference(2).at == rows("1 1 1 0; 0 1 -1 -1")
    assert reference(2).bt[3] == rows("0 1 0 -1")[0]
    assert reference(4) == cook_toom(4, 3, "lavin")
    assert cook_toom(6, 3, "reference") == reference(6)
    assert [row[0] for row in reference(6).g[:-1]] == [Fraction(1, s) for s in (4, -6, -6, 24, 24, -12, -12)]
    assert reference(6).is_exact()


@pytest.mark.parametrize(
    ("m", "r", "ratio"), [(2, 3, 2.25), (4, 3, 4), (6, 3, 5.0625), (2, 5, 25 / 9), (4, 5, 6.25), (6, 5, 9)]
)
def test_multiplications(m: int, r: int, ratio: float) -> None:
    assert r * r / float(cook_toom(m, r).multiplications()) == pytest.approx(ratio)


def test_estimates() -> None:
    """Spec 0.3: condition numbers, growth of the values, and which points lose what."""
    assert list(cook_toom(4, 3, "lavin").condition_numbers().values()) == pytest.approx([20, 11, 4], rel=0.03)
    assert list(cook_toom(6, 3).condition_numbers().values()) == pytest.approx([31, 142, 2.5], rel=0.03)
    assert cook_toom(4, 3, "lavin").growth()["input"] == 100
    assert cook_toom(2, 3).growth()["input"] == 4
    f4 = {points: cook_toom(4, 3, points) for points in ("balanced", "lavin", "half", "two_thirds")}
    assert min(f4, key=lambda points: f4[points].amplification()) == "balanced"
    assert cook_toom(6, 5).amplification() < 0.37 * cook_toom(6, 5, "lavin").amplification()
    per_tensor = sorted(f4, key=lambda points: f4[points].amplification(per_tap=False))
    assert per_tensor == ["two_thirds", "half", "balanced", "lavin"]


def test_the_amplification_is_what_random_errors_do() -> None:
    made, generator = cook_toom(4, 3), np.random.default_rng(0)
    at, g, bt = (np.array(matrix, dtype=float) for matrix in (made.at, made.g, made.bt))
    d, w = generator.normal(size=(40_000, 6, 6)), generator.normal(size=(40_000, 3, 3))
    products = (bt @ d @ bt.T) * (g @ w @ g.T)
    y = at @ products @ at.T
    error = at @ (products * generator.normal(size=products.shape)) @ at.T
    assert np.linalg.norm(error) / np.linalg.norm(y) == pytest.approx(made.amplification(), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3), "at least 1"),
        ((4, 3, "lavine"), "did you mean 'lavin'"),
        ((6, 3, "half"), "has 5 points and F\\(6, 3\\) needs 7"),
        ((4, 3, [0, 1, -1, 2]), "needs 5 different points"),
        ((2, 3, [0, 1, "2/2"]), "needs 3 different points"),
        ((2, 3, [0, 1, "x"]), "whole numbers or fractions"),
        ((2, 3, [0, 1, "1/0"]), "whole numbers or fractions"),
        ((4, 5, "reference"), "use the points 'balanced'"),
    ],
)
def test_what_cannot_be_made(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(TersenetError, match=message):
        cook_toom(*arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TersenetError, match="not zero"):
        cook_toom(2, 3).rescaled([Fraction(0)] * 4, [Fraction(1)] * 4)
