"""Exact transforms of Winograd's minimal filtering F(m, r), for any m and r, in rational numbers. No torch.

For a tile d of t = m + r - 1 inputs and a filter g of r taps, the m outputs of their correlation are
A^T ((G g) * (B^T d)): t multiplications instead of m r. In two dimensions each transform is applied to both axes.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016; the points from Barabasz et al.,
arXiv 1803.10986.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from tersenet.errors import TersenetError, UnknownNameError

Matrix = tuple[tuple[Fraction, ...], ...]


def _fractions(text: str) -> tuple[Fraction, ...]:
    return tuple(Fraction(part) for part in text.split())


# Of each name the first sequence that is long enough is taken, and of that the first t - 1 points.
POINT_SETS: dict[str, tuple[tuple[Fraction, ...], ...]] = {
    # Smallest error in float32, and with one scale per tap: 35 % below `lavin` for F(4, 3), a third of it for 9 points.
    # Those of 9 and 11 are short fractions beside the real numbers that minimize `amplification`: within 1 %.
    "balanced": (
        _fractions("0 1 -1 1/2 -2 2 -1/2"),
        _fractions("0 5/4 -5/4 4/5 -4/5 12/5 -12/5 5/12 -5/12"),
        _fractions("0 1 -1 16/11 -16/11 11/16 -11/16 14/5 -14/5 5/14 -5/14"),
        _fractions("0 1 -1 1/2 -2 2 -1/2 4 -1/4 -4 1/4 3/4 -4/3 -3/4 4/3"),
    ),
    # What libraries use, and the paper's F2 and F4; 9 points as Barabasz et al. have them.
    "lavin": (_fractions("0 1 -1 2 -2 1/2 -1/2 4 -1/4 -4 1/4"),),
    # The reference's, with its scaling; see `reference`.
    "reference": (_fractions("0 1 -1 2 -2 3/2 -3/2"),),
    # Small entries in A^T: smaller error where M has one scale for all taps.
    "half": (_fractions("0 1 -1 1/2 -1/2"),),
    "two_thirds": (_fractions("0 1 -1 2/3 -2/3"),),
}


@dataclass(frozen=True)
class Transforms:
    """A^T (m, t), G (t, r) and B^T (t, t) of F(m, r), and the t - 1 finite points they come from."""

    m: int
    r: int
    points: tuple[Fraction, ...]
    at: Matrix
    g: Matrix
    bt: Matrix

    @property
    def t(self) -> int:
        """Inputs of one tile, along one axis."""
        return self.m + self.r - 1

    def is_exact(self) -> bool:
        """Whether the triple computes the correlation, symbolically: sum_k A^T_ik G_kj B^T_kl = [l = i + j]."""
        taps = range(self.t)
        return all(
            sum((self.at[i][k] * self.g[k][j] * self.bt[k][n] for k in taps), Fraction()) == (n == i + j)
            for i in range(self.m)
            for j in range(self.r)
            for n in taps
        )

    def rescaled(self, a: Sequence[Fraction], g: Sequence[Fraction]) -> Transforms:
        """(A^T S_a, S_g G, S_b B^T) with S_b = (S_a S_g)^-1: the freedom that an exact triple has.

        Raises:
            TersenetError: a factor is zero, or there are not t of them.
        """
        if len(a) != self.t or len(g) != self.t or not (all(a) and all(g)):
            raise TersenetError(f"F({self.m}, {self.r}) is rescaled by t (={self.t}) factors that are not zero")
        at = tuple(tuple(x * s for x, s in zip(row, a, strict=True)) for row in self.at)
        rows = tuple(tuple(x * s for x in row) for row, s in zip(self.g, g, strict=True))
        bt = tuple(tuple(x / (s * u) for x in row) for row, s, u in zip(self.bt, a, g, strict=True))
        return Transforms(self.m, self.r, self.points, at, rows, bt)

    def multiplications(self) -> Fraction:
        """Per output and pair of channels, in two dimensions: (t / m)^2, where the direct convolution has r^2."""
        return Fraction(self.t, self.m) ** 2

    def growth(self) -> dict[str, Fraction]:
        """How much larger the transformed values can get: (largest absolute row sum)^2, by matrix."""
        named = {"input": self.bt, "weight": self.g, "output": self.at}
        return {name: max(sum(map(abs, row), Fraction()) for row in matrix) ** 2 for name, matrix in named.items()}

    def amplification(self, per_tap: bool = True) -> float:
        """Expected relative error of the output per relative error of the products, in two dimensions.

        The products of tap k have the size |B^T_k| |G_k| for independent inputs and weights. Each has an error relative
        to its own size (`per_tap`: floating point, or one scale per tap) or to the largest tap's (one scale for all).
        """
        size = [math.hypot(*map(float, b)) * math.hypot(*map(float, g)) for b, g in zip(self.bt, self.g, strict=True)]
        if not per_tap:
            size = [max(size)] * self.t
        errors = (sum((float(x) * s) ** 2 for x, s in zip(row, size, strict=True)) for row in self.at)
        return sum(errors) / self.m / self.r

    def condition_numbers(self) -> dict[str, float]:
        """Ratio of the largest to the smallest singular value of B^T, A^T and G."""
        import numpy as np

        named = {"bt": self.bt, "at": self.at, "g": self.g}
        return {name: float(np.linalg.cond(np.array(matrix, dtype=float))) for name, matrix in named.items()}


def cook_toom(m: int, r: int, points: str | Sequence[Fraction | int | str] = "balanced") -> Transforms:
    """The exact transforms of F(m, r): m outputs of a filter of r taps.

    Args:
        m: Outputs of a tile along one axis.
        r: Taps of the filter along one axis.
        points: A name of `POINT_SETS`, or t - 1 = m + r - 2 different rational numbers; infinity is always the last.

    Raises:
        TersenetError: m or r below 1, an unknown name, too few points or one that comes twice or is no number.
    """
    if m < 1 or r < 1:
        raise TersenetError(f"F({m}, {r}): m outputs and r taps must be at least 1")
    if points == "reference":
        return reference(m, r)
    chosen = _named(m, r, points) if isinstance(points, str) else _own(m, r, points)
    return _checked(m, r, tuple(chosen))


@cache
def _checked(m: int, r: int, points: tuple[Fraction, ...]) -> Transforms:
    """Kept, since a network asks for the same few again and again."""
    made = _build(m, r, points)
    if not made.is_exact():
        raise TersenetError(f"F({m}, {r}) at the points {text(points)} is not exact; this is a fault of tersenet")
    return made


def reference(m: int, r: int = 3) -> Transforms:
    """The transforms of the Winograd-aware reference, which scales their taps differently.

    Its scales matter only where one scale is used for a whole tensor.

    Differs: for F(6, 3) the reference has one of its scales in the wrong place, so that its F(6, 3) is no convolution.
    Raises: TersenetError for what the reference does not have.
    Source: Fernandez-Marques et al., Searching for Winograd-aware Quantized Networks, MLSys 2020, arXiv 2002.10711.
    """
    # Scales of the rows of B^T (divisors of those of G), and signs of the columns of A^T.
    known = {
        2: ("1 2 2 -1", "1 1 1 -1"),
        4: ("4 -6 -6 24 24 1", "1 1 1 1 1 1"),
        6: ("4 -6 -6 24 24 -12 -12 1", "1 1 1 1 1 1 1 1"),
    }
    if r != 3 or m not in known:
        raise TersenetError(
            f"the reference has F(2, 3), F(4, 3) and F(6, 3), not F({m}, {r}); use the points 'balanced'"
        )
    scales, signs = map(_fractions, known[m])
    plain = _build(m, r, POINT_SETS["reference"][0][: m + 1])
    # Its G is the Vandermonde matrix over these scales; the first column of the Vandermonde matrix is 1, at infinity 0.
    f = [1 / row[0] for row in plain.g[:-1]] + [Fraction(1)]
    return plain.rescaled(signs, [x / (s * sign) for x, s, sign in zip(f, scales, signs, strict=True)])


def text(points: Sequence[Fraction]) -> str:
    return ", ".join(map(str, points))


def _named(m: int, r: int, name: str) -> tuple[Fraction, ...]:
    if name not in POINT_SETS:
        raise UnknownNameError("point set", name, POINT_SETS)
    size = m + r - 2
    for found in POINT_SETS[name]:
        if len(found) >= size:
            return found[:size]
    longest = len(POINT_SETS[name][-1])
    raise TersenetError(f"the point set {name!r} has {longest} points and F({m}, {r}) needs {size}; list them yourself")


def _own(m: int, r: int, points: Sequence[Fraction | int | str]) -> tuple[Fraction, ...]:
    try:
        chosen = tuple(Fraction(point) for point in points)
    except (ValueError, ZeroDivisionError) as error:
        raise TersenetError(f"points must be whole numbers or fractions such as -1/2: {error}") from None
    if len(chosen) != m + r - 2 or len(set(chosen)) != len(chosen):
        raise TersenetError(f"F({m}, {r}) needs {m + r - 2} different points beside infinity, not {text(chosen)}")
    return chosen


def _build(m: int, r: int, points: tuple[Fraction, ...]) -> Transforms:
    """Rows of B^T are the coefficients of prod_{j != i} (x - p_j), for infinity of prod_j (x - p_j): no inverse."""
    t = m + r - 1
    others = [points[:i] + points[i + 1 :] for i in range(len(points))]
    f = [math.prod((p - q for q in rest), start=Fraction(1)) for p, rest in zip(points, others, strict=True)]
    # wincnn's convention: the first row of G and B^T is positive.
    sign = [Fraction(-1 if i == 0 and value < 0 else 1) for i, value in enumerate(f)]
    infinity = (Fraction(0),) * t
    at = [[p**i for p in points] + [Fraction(i == m - 1)] for i in range(m)]
    g = [[s * p**j / x for j in range(r)] for p, x, s in zip(points, f, sign, strict=True)]
    g.append([Fraction(j == r - 1) for j in range(r)])
    bt = [[s * x for x in (*_roots(rest), *infinity)[:t]] for rest, s in zip(others, sign, strict=True)]
    bt.append(list(_roots(points)))
    return Transforms(m, r, points, *(tuple(map(tuple, matrix)) for matrix in (at, g, bt)))


def _roots(points: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """Coefficients of prod (x - p), lowest power first."""
    found = [Fraction(1)]
    for p in points:
        found = [low - p * high for low, high in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return tuple(found)
